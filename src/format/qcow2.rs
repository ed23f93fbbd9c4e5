//! The header of a qcow2 image: what a replica has to know of it, and no more.
//!
//! Every byte of an image is replicated as it is, so nothing here touches clusters or tables.
//! Read: sizes, the backing file, features that would leave data outside the file. Written: the
//! name of the backing file, when a restored overlay would otherwise not find its base.
//!
//! ```text
//!   offset bytes  field, all big-endian                 0      4  magic "QFI\xfb"
//!        4     4  version: 2 or 3                       8      8  offset of the backing name, 0: none
//!       16     4  length of the backing name           20      4  cluster bits: 9 to 21
//!       24     8  virtual size                         32      4  encryption: 0 none, 1 AES, 2 LUKS
//!       60     4  number of internal snapshots         72      8  incompatible features (version 3)
//!      100     4  header length (version 3; 72 in 2)    then extensions {type 4, length 4, data,
//!                                                       padding to 8}, ended by type 0
//!   then the backing name; the rest of the first cluster is zeros
//! ```
//!
//! Source: docs/interop/qcow2.rst of QEMU. Another version is refused by number. A guest can
//! write anything into a raw disk, a header like this included: whoever knows that an image is
//! raw must not ask here.

use crate::base::{Error, ErrorKind, Result};

/// First bytes of an image.
pub const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
/// Longest name of a backing file, in bytes.
pub const BACKING_NAME_BYTES_MAX: usize = 1023;
/// Largest first cluster, in bytes: no header needs more.
pub const HEADER_BYTES_MAX: usize = 1 << 21;
/// As many bytes tell [`Qcow2Header::bytes_needed`].
pub const HEADER_BYTES_MIN: usize = 72;

const VERSION_2_LENGTH: usize = 72;
const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
const EXTENSIONS_MAX: usize = 64;
const FORMAT_NAME_BYTES_MAX: usize = 15;
const INCOMPATIBLE_DIRTY: u64 = 1;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;

/// How an image is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// Not at all.
    None,
    /// The old AES-CBC method.
    Aes,
    /// LUKS inside qcow2.
    Luks,
    /// A method this program does not know. Replicated like any other bytes.
    Unknown(u32),
}

/// What the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Header {
    /// 2 or 3.
    pub version: u32,
    /// Size of the disk that the guest sees, in bytes.
    pub virtual_size: u64,
    /// Size of a cluster, in bytes.
    pub cluster_bytes: u64,
    /// Name of the backing file, as written.
    pub backing: Option<String>,
    /// Format of the backing file, if the header names it.
    pub backing_format: Option<String>,
    /// Encryption of the payload.
    pub encryption: Encryption,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Feature bits that a reader must know.
    pub incompatible: u64,
    /// Name of the external data file, if the header names it.
    pub data_file: Option<String>,
    /// Where the extensions end: the first byte that a backing name may have.
    names_start: usize,
    /// Where the backing name is, in bytes of the file; 0: nowhere.
    backing_offset: usize,
}

/// Bytes to be written over an image file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Offset in bytes.
    pub offset: u64,
    /// What to write there.
    pub bytes: Vec<u8>,
}

impl Qcow2Header {
    /// Whether a file that begins so is a qcow2 (or qcow) image.
    pub fn is_qcow(bytes: &[u8]) -> bool {
        bytes.starts_with(&QCOW2_MAGIC)
    }

    /// How many bytes from the beginning of the file [`Qcow2Header::decode`] wants to see:
    /// the first cluster. `start`: at least [`HEADER_BYTES_MIN`] bytes.
    pub fn bytes_needed(start: &[u8]) -> Result<usize> {
        let bits = be32(start, 20)?;
        if !(9..=21).contains(&bits) {
            return Err(damaged(format!("its clusters would have 2^{bits} bytes; 2^9 to 2^21 are possible")));
        }
        Ok((1usize << bits).min(HEADER_BYTES_MAX))
    }

    /// Reads a header from the first cluster (or all of a file that is shorter).
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        if !Self::is_qcow(bytes) {
            return Err(damaged("it does not begin with the mark of qcow2"));
        }
        let version = be32(bytes, 4)?;
        if !(2..=3).contains(&version) {
            return Err(Error::new(ErrorKind::Version, "the qcow2 header cannot be read")
                .why(format!("it has version {version}; versions 2 and 3 are known"))
                .hint("qemu-img convert -O qcow2 OLD NEW"));
        }
        let cluster_bytes = Self::bytes_needed(bytes)?;
        let virtual_size = be64(bytes, 24)?;
        if i64::try_from(virtual_size).is_err() {
            return Err(damaged(format!("its virtual size is {virtual_size}")));
        }
        let length = match version {
            2 => VERSION_2_LENGTH,
            _ => usize::try_from(be32(bytes, 100)?).unwrap_or(usize::MAX),
        };
        if length < VERSION_2_LENGTH || length > cluster_bytes || (version == 3 && length < 104) {
            return Err(damaged(format!("its header would have {length} bytes")));
        }
        let (backing_offset, backing) = decode_backing(bytes, cluster_bytes)?;
        let mut header = Self {
            version,
            virtual_size,
            cluster_bytes: cluster_bytes as u64,
            backing,
            backing_format: None,
            encryption: match be32(bytes, 32)? {
                0 => Encryption::None,
                1 => Encryption::Aes,
                2 => Encryption::Luks,
                other => Encryption::Unknown(other),
            },
            snapshots: be32(bytes, 60)?,
            incompatible: if version == 3 { be64(bytes, 72)? } else { 0 },
            data_file: None,
            names_start: 0,
            backing_offset,
        };
        header.decode_extensions(bytes, length)?;
        Ok(header)
    }

    /// Whether guest data lies in another file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DATA_FILE != 0
    }

    /// Whether the image was not closed cleanly (lazy reference counts). Harmless.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DIRTY != 0
    }

    /// Whether QEMU found the image corrupt and marked it so.
    pub fn is_marked_corrupt(&self) -> bool {
        self.incompatible & INCOMPATIBLE_CORRUPT != 0
    }

    /// Extensions end at type 0, at the backing name, or at the end of the cluster.
    fn decode_extensions(&mut self, bytes: &[u8], start: usize) -> Result<()> {
        let cluster = usize::try_from(self.cluster_bytes).unwrap_or(HEADER_BYTES_MAX);
        let limit = match self.backing_offset {
            offset if offset >= start => offset,
            _ => cluster,
        }
        .min(bytes.len());
        let mut at = start;
        for _ in 0..EXTENSIONS_MAX {
            if at.saturating_add(8) > limit {
                self.names_start = at.min(limit);
                return Ok(());
            }
            let kind = be32(bytes, at)?;
            let length = usize::try_from(be32(bytes, at + 4)?).unwrap_or(usize::MAX);
            at += 8;
            if kind == EXTENSION_END {
                self.names_start = at;
                return Ok(());
            }
            let data = at.checked_add(length).filter(|end| *end <= limit).and_then(|end| bytes.get(at..end));
            let data = data.ok_or_else(|| damaged(format!("an extension would have {length} bytes")))?;
            match kind {
                EXTENSION_BACKING_FORMAT if length > FORMAT_NAME_BYTES_MAX => {
                    return Err(damaged("the name of the backing format is too long"));
                }
                EXTENSION_BACKING_FORMAT => self.backing_format = Some(text(data)?),
                EXTENSION_DATA_FILE => self.data_file = Some(text(data)?),
                _ => {}
            }
            at = at.saturating_add(length.div_ceil(8).saturating_mul(8));
        }
        Err(damaged(format!("it has more than {EXTENSIONS_MAX} extensions")))
    }

    /// What to write so that the image names `name` as its backing file. `bytes`: what
    /// [`Qcow2Header::decode`] saw. `None`: the name does not fit into the first cluster, or
    /// something unknown lies where it would go.
    pub fn rewrite_backing(&self, bytes: &[u8], name: &str) -> Option<Vec<Patch>> {
        let old = self.backing.as_ref()?.len();
        if name.is_empty() || name.len() > BACKING_NAME_BYTES_MAX || name.bytes().any(|b| b == 0) {
            return None;
        }
        let offset = self.backing_offset;
        let end = offset.checked_add(name.len())?;
        if name.len() > old {
            let beyond = bytes.get(offset.checked_add(old)?..end)?;
            let is_free = offset >= self.names_start
                && end as u64 <= self.cluster_bytes
                && beyond.iter().all(|b| *b == 0);
            if !is_free {
                return None;
            }
        }
        let mut written = name.as_bytes().to_vec();
        written.resize(old.max(name.len()), 0);
        let length = u32::try_from(name.len()).ok()?;
        Some(vec![
            Patch { offset: offset as u64, bytes: written },
            Patch { offset: 16, bytes: length.to_be_bytes().to_vec() },
        ])
    }
}

fn decode_backing(bytes: &[u8], cluster_bytes: usize) -> Result<(usize, Option<String>)> {
    let offset = be64(bytes, 8)?;
    let length = usize::try_from(be32(bytes, 16)?).unwrap_or(usize::MAX);
    if offset == 0 {
        return Ok((0, None));
    }
    if length > BACKING_NAME_BYTES_MAX {
        return Err(damaged(format!("the name of its backing file would have {length} bytes")));
    }
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let name = start
        .checked_add(length)
        .filter(|end| *end <= cluster_bytes && start >= VERSION_2_LENGTH)
        .and_then(|end| bytes.get(start..end))
        .ok_or_else(|| damaged("the name of its backing file lies outside the first cluster"))?;
    let name = text(name)?;
    Ok((start, (!name.is_empty()).then_some(name)))
}

/// Text up to the first NUL, as a C program would read it.
fn text(bytes: &[u8]) -> Result<String> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    let bytes = bytes.get(..end).unwrap_or_default();
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(damaged("a name in it is no UTF-8")),
    }
}

fn damaged(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Damaged, "the qcow2 header cannot be read").why(why).hint("qemu-img check IMAGE")
}

fn field<const N: usize>(bytes: &[u8], offset: usize) -> Result<[u8; N]> {
    offset
        .checked_add(N)
        .and_then(|end| bytes.get(offset..end))
        .and_then(|b| b.try_into().ok())
        .ok_or_else(|| damaged(format!("it ends before byte {}", offset.saturating_add(N))))
}

fn be32(bytes: &[u8], offset: usize) -> Result<u32> {
    field(bytes, offset).map(u32::from_be_bytes)
}

fn be64(bytes: &[u8], offset: usize) -> Result<u64> {
    field(bytes, offset).map(u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A header as qemu-img writes it: version 3, backing format, backing name at the end.
    fn sample(backing: &str, format: &str) -> Vec<u8> {
        let mut b = vec![0u8; 65536];
        b[..4].copy_from_slice(&QCOW2_MAGIC);
        b[4..8].copy_from_slice(&3u32.to_be_bytes());
        b[20..24].copy_from_slice(&16u32.to_be_bytes());
        b[24..32].copy_from_slice(&(1u64 << 30).to_be_bytes());
        b[100..104].copy_from_slice(&112u32.to_be_bytes());
        let mut at = 112;
        b[at..at + 4].copy_from_slice(&EXTENSION_BACKING_FORMAT.to_be_bytes());
        b[at + 4..at + 8].copy_from_slice(&(format.len() as u32).to_be_bytes());
        b[at + 8..at + 8 + format.len()].copy_from_slice(format.as_bytes());
        at += 8 + format.len().div_ceil(8) * 8 + 8;
        b[8..16].copy_from_slice(&(at as u64).to_be_bytes());
        b[16..20].copy_from_slice(&(backing.len() as u32).to_be_bytes());
        b[at..at + backing.len()].copy_from_slice(backing.as_bytes());
        b
    }

    fn apply(bytes: &mut [u8], patches: &[Patch]) {
        for p in patches {
            let at = p.offset as usize;
            bytes[at..at + p.bytes.len()].copy_from_slice(&p.bytes);
        }
    }

    #[test]
    fn reads_what_qemu_writes() {
        let h = Qcow2Header::decode(&sample("/vm/base.qcow2", "qcow2")).unwrap();
        assert_eq!(h.backing.as_deref(), Some("/vm/base.qcow2"));
        assert_eq!(h.backing_format.as_deref(), Some("qcow2"));
        assert_eq!((h.version, h.virtual_size, h.cluster_bytes), (3, 1 << 30, 65536));
        assert!(!h.has_data_file() && !h.is_dirty() && !h.is_marked_corrupt());
    }

    #[test]
    fn a_name_that_something_follows_cannot_grow() {
        let mut bytes = sample("/vm/b", "raw");
        let h = Qcow2Header::decode(&bytes).unwrap();
        let after = h.backing_offset + 6;
        bytes[after] = 7;
        assert_eq!(h.rewrite_backing(&bytes, "/vm/bb-longer"), None);
        assert!(h.rewrite_backing(&bytes, "b").is_some());
        assert_eq!(h.rewrite_backing(&bytes, &"x".repeat(1024)), None);
    }

    #[test]
    fn other_versions_are_refused_by_number() {
        let mut bytes = sample("", "raw");
        bytes[7] = 1;
        assert_eq!(Qcow2Header::decode(&bytes).unwrap_err().kind(), ErrorKind::Version);
    }

    proptest! {
        /// Any bytes, and any damage to a good header, give a header or an error.
        #[test]
        fn damage_never_panics(
            noise in prop::collection::vec(any::<u8>(), 0..300),
            flips in prop::collection::vec((0usize..200, any::<u8>()), 0..12),
            length in 0usize..65537,
        ) {
            let mut raw = QCOW2_MAGIC.to_vec();
            raw.extend(&noise);
            let _ = Qcow2Header::decode(&noise);
            let _ = Qcow2Header::decode(&raw);
            let mut bytes = sample("/vm/base.qcow2", "qcow2");
            for (at, value) in flips { bytes[at] = value }
            bytes.truncate(length);
            if let Ok(h) = Qcow2Header::decode(&bytes) {
                for p in h.rewrite_backing(&bytes, "another/name").unwrap_or_default() {
                    prop_assert!(p.offset + p.bytes.len() as u64 <= h.cluster_bytes.max(65536));
                }
            }
        }

        /// A rewritten name is read back, and nothing else of the header has changed.
        #[test]
        fn rewriting_changes_the_name_only(old in "[a-z/.]{1,40}", new in "[a-z/.]{1,200}") {
            let mut bytes = sample(&old, "qcow2");
            let before = Qcow2Header::decode(&bytes).unwrap();
            let patches = before.rewrite_backing(&bytes, &new).unwrap();
            apply(&mut bytes, &patches);
            let after = Qcow2Header::decode(&bytes).unwrap();
            prop_assert_eq!(after.backing.as_deref(), Some(new.as_str()));
            prop_assert_eq!(Qcow2Header { backing: before.backing.clone(), ..after }, before);
        }
    }
}
