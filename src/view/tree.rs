//! The files of one point as a tree: its disks by path, its definition below `.afterimage`.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Component, Path, PathBuf};

use crate::core::ports::points::PointReader;

/// Folder of the definition files inside a point, a clone and a restored VM.
pub(super) const DEFINITION_FOLDER: &str = ".afterimage";

/// What a node is.
#[derive(Debug)]
pub(super) enum Item {
    /// A folder: name to number of node.
    Folder(BTreeMap<OsString, usize>),
    /// Disk number so and so of the point.
    Disk(usize),
    /// Definition file number so and so of the point.
    Definition(usize),
}

/// All folders and files of a point. Node 0 is the folder of the point itself. The numbers
/// follow from the content, so a point has the same ones whenever it is opened.
#[derive(Debug)]
pub(super) struct Tree {
    nodes: Vec<Node>,
}

#[derive(Debug)]
struct Node {
    parent: usize,
    item: Item,
}

impl Tree {
    /// The tree of an open point. A path that could leave its folder, or that is a file and a
    /// folder at once, is left out with a line in the log: it comes from a document.
    pub(super) fn of(reader: &dyn PointReader) -> Self {
        let mut tree = Self { nodes: vec![Node { parent: 0, item: Item::Folder(BTreeMap::new()) }] };
        for (number, disk) in reader.disks().iter().enumerate() {
            tree.insert(&disk.path, Item::Disk(number));
        }
        for (number, file) in reader.definition().iter().enumerate() {
            let path = definition_path(&file.name);
            tree.insert(&path, Item::Definition(number));
        }
        tree
    }

    fn insert(&mut self, path: &Path, item: Item) {
        if self.try_insert(path, item).is_none() {
            log::warn!("a file of a point cannot be shown: {} is no path inside it", path.display());
        }
    }

    fn try_insert(&mut self, path: &Path, item: Item) -> Option<()> {
        let names = inside(path)?;
        let (last, folders) = names.split_last()?;
        let mut at = 0;
        for name in folders {
            at = match self.child(at, name) {
                Some(next) => next,
                None => self.add(at, name, Item::Folder(BTreeMap::new()))?,
            };
        }
        if self.child(at, last).is_some() {
            return None;
        }
        self.add(at, last, item).map(|_| ())
    }

    fn add(&mut self, parent: usize, name: &OsStr, item: Item) -> Option<usize> {
        let number = self.nodes.len();
        let Item::Folder(children) = &mut self.nodes.get_mut(parent)?.item else { return None };
        children.insert(name.to_owned(), number);
        self.nodes.push(Node { parent, item });
        Some(number)
    }

    /// What node `number` is.
    pub(super) fn item(&self, number: usize) -> Option<&Item> {
        Some(&self.nodes.get(number)?.item)
    }

    /// The folder that holds node `number`.
    pub(super) fn parent(&self, number: usize) -> usize {
        self.nodes.get(number).map_or(0, |n| n.parent)
    }

    /// The node `name` in folder `number`.
    pub(super) fn child(&self, number: usize, name: &OsStr) -> Option<usize> {
        match self.item(number)? {
            Item::Folder(children) => children.get(name).copied(),
            _ => None,
        }
    }
}

/// Where a definition file is, relative to the folder of the point.
pub(super) fn definition_path(name: &str) -> PathBuf {
    Path::new(DEFINITION_FOLDER).join(name)
}

/// The components of a relative path that stays inside its folder.
pub(super) fn inside(path: &Path) -> Option<Vec<&OsStr>> {
    let names: Option<Vec<_>> = path
        .components()
        .map(|c| match c {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect();
    names.filter(|names| !names.is_empty())
}
