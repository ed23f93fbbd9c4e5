//! House rules that a compiler does not know: the layer rule, sizes, words that promise work
//! instead of doing it, who may ask the time, who may write `unsafe`.
//!
//! Every rule is a function from the text of a file to problems, and has its own test below with
//! a text that breaks it, so that a rule that has gone blind is seen.

use std::fs;
use std::path::{Path, PathBuf};

/// Lines of code of one file at most; comments, blank lines and test modules do not count.
const FILE_LINES_MAX: usize = 500;
/// Lines of one function at most.
const FUNCTION_LINES_MAX: usize = 70;
/// Characters of one line at most, where no string literal makes it longer.
const LINE_WIDTH_MAX: usize = 110;

/// From the top down; a file uses its own folder and layers below it. The folders of one layer do
/// not see each other.
const LAYERS: [&[&str]; 6] = [
    &["main", "cli"],
    &["host"],
    &["filter", "tracker", "ship", "resync", "vault", "view", "machine"],
    &["core"],
    &["format"],
    &["base"],
];

/// Written in two halves, so that this file may name them.
const BANNED_WORDS: [&str; 7] = [
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("XX", "X"),
    concat!("for", " now"),
    concat!("place", "holder"),
    concat!("unimpl", "emented!"),
    concat!("to", "do!("),
];

/// Asking the time anywhere else than in the one clock. Beside it only `Instant` is allowed, and
/// only in these files, for the patience of a wait.
const CLOCK: &str = "base/clock.rs";
const MAY_MEASURE_WAITS: [&str; 7] = [
    "host/commands.rs",
    "host/jobs.rs",
    "host/state.rs",
    "host/status.rs",
    "tracker/disk.rs",
    "tracker/sync.rs",
    "tracker/vm.rs",
];

/// The one module of each edge that may hold `unsafe`.
const MAY_BE_UNSAFE: [&str; 3] = ["filter/sys.rs", "ship/priority.rs", "tracker/shm.rs"];

struct Source {
    /// Relative to the folder of the package, with `/`.
    path: String,
    text: String,
}

fn package() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn collect(dir: &Path, sources: &mut Vec<Source>, keep: &dyn Fn(&Path) -> bool) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    let mut paths: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            collect(&path, sources, keep);
        } else if keep(&path) {
            let text = String::from_utf8(fs::read(&path).unwrap())
                .unwrap_or_else(|_| panic!("{} is not UTF-8", path.display()));
            let path = path.strip_prefix(package()).unwrap().to_str().unwrap().to_owned();
            sources.push(Source { path, text });
        }
    }
}

fn rust_files(folder: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    collect(&package().join(folder), &mut sources, &|p| p.extension().is_some_and(|e| e == "rs"));
    sources
}

/// The source of the product, without modules that are only compiled for tests.
fn product_files() -> Vec<Source> {
    let mut sources = rust_files("src");
    let modules = test_modules(&sources);
    sources.retain(|s| {
        let path = s.path.trim_end_matches(".rs");
        !modules.iter().any(|m| path == m || path.starts_with(&format!("{m}/")))
    });
    sources
}

fn all_text() -> Vec<Source> {
    let mut sources = rust_files("src");
    sources.extend(rust_files("tests"));
    collect(&package().join("scripts"), &mut sources, &|_| true);
    collect(&package().join(".ci"), &mut sources, &|_| true);
    sources
}

/// Folder of a file below `src`: `filter/ops.rs` and `filter.rs` are of `filter`.
fn folder_of(path: &str) -> &str {
    let inside = path.strip_prefix("src/").unwrap_or(path);
    let first = inside.split('/').next().unwrap_or(inside);
    first.strip_suffix(".rs").unwrap_or(first)
}

fn layer_of(folder: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&folder))
}

fn is_test_file(path: &str) -> bool {
    path.starts_with("tests/")
        || path.split('/').any(|p| p == "tests" || p == "tests.rs" || p.ends_with("_tests.rs"))
}

/// The lines of a file with their numbers (from 1), without items under `#[cfg(test)]`. Formatted
/// source is assumed: an item ends with a brace at its own indentation.
fn lines_outside_tests(text: &str) -> Vec<(usize, &str)> {
    let mut lines = Vec::new();
    let mut inside: Option<usize> = None;
    let mut pending: Option<usize> = None;
    for (index, line) in text.lines().enumerate() {
        let trimmed = line.trim_start();
        let indent = line.len() - trimmed.len();
        if let Some(at) = inside {
            if indent == at && (trimmed.starts_with('}') || trimmed.starts_with(')')) {
                inside = None;
            }
        } else if let Some(at) = pending {
            if trimmed.starts_with("#[") || trimmed.starts_with("//") || trimmed.is_empty() {
                continue;
            }
            pending = None;
            if !trimmed.ends_with(';') && !trimmed.ends_with(',') && !trimmed.ends_with("{}") {
                inside = Some(at);
            }
        } else if trimmed.starts_with("#[cfg(test)]") || trimmed.starts_with("#[cfg(all(test") {
            pending = Some(indent);
        } else {
            lines.push((index + 1, line));
        }
    }
    lines
}

/// The same without comments and blank lines.
fn code_lines(text: &str) -> Vec<(usize, &str)> {
    let outside = lines_outside_tests(text).into_iter();
    let code = outside.filter(|(_, l)| !l.trim_start().is_empty() && !l.trim_start().starts_with("//"));
    code.map(|(number, line)| match line.find(" // ") {
        Some(at) if !line[..at].contains('"') => (number, &line[..at]),
        _ => (number, line),
    })
    .collect()
}

/// Files that are modules under `#[cfg(test)]`, or lie in the folder of one: what their parents say.
fn test_modules(sources: &[Source]) -> Vec<String> {
    let mut modules = Vec::new();
    for source in sources {
        let folder = match source.path.rsplit_once('/') {
            Some((folder, "mod.rs" | "lib.rs" | "main.rs")) => folder.to_owned(),
            _ => source.path.trim_end_matches(".rs").to_owned(),
        };
        let lines: Vec<&str> = source.text.lines().map(str::trim).collect();
        for pair in lines.windows(2).filter(|pair| pair[0].starts_with("#[cfg(test)]")) {
            let name = pair[1].rsplit_once("mod ").and_then(|(_, name)| name.strip_suffix(';'));
            modules.extend(name.map(|name| format!("{folder}/{name}")));
        }
    }
    modules
}

/// The first names after every `crate::`, braces opened.
fn crate_uses(line: &str, rest_of_file: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (at, _) in line.match_indices("crate::") {
        if line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let after = &line[at + "crate::".len()..];
        if let Some(group) = after.strip_prefix('{') {
            let whole = if group.contains('}') { group } else { rest_of_file };
            let mut depth = 0;
            let mut name = String::new();
            for c in whole.chars() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => names.push(std::mem::take(&mut name)),
                    c if depth == 0 => name.push(c),
                    _ => {}
                }
            }
            names.push(name);
        } else {
            names.push(after.to_owned());
        }
    }
    names
        .iter()
        .map(|n| n.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>())
        .filter(|n| !n.is_empty())
        .collect()
}

fn layer_problems(source: &Source) -> Vec<String> {
    let folder = folder_of(&source.path);
    if folder == "lib" || folder == "main" || is_test_file(&source.path) {
        return Vec::new();
    }
    let Some(layer) = layer_of(folder) else {
        return vec![format!("{}: the folder {folder} has no layer", source.path)];
    };
    let all: Vec<&str> = source.text.lines().collect();
    let mut problems = Vec::new();
    for (number, line) in code_lines(&source.text) {
        let rest = all[number..].join("\n");
        for used in crate_uses(line, &rest) {
            let Some(other) = layer_of(&used) else { continue };
            if used != folder && other <= layer {
                problems.push(format!("{}:{number}: {folder} must not use {used}", source.path));
            }
        }
    }
    problems
}

fn size_problems(source: &Source) -> Vec<String> {
    let mut problems = Vec::new();
    let code = code_lines(&source.text);
    if code.len() > FILE_LINES_MAX {
        problems.push(format!("{}: {} lines of code, {FILE_LINES_MAX} at most", source.path, code.len()));
    }
    for (number, line) in lines_outside_tests(&source.text) {
        let width = line.chars().count();
        // A string literal cannot be broken, nor the row of a table in a comment.
        let fixed = line.contains('"') || line.trim_start_matches(['/', '!', ' ']).starts_with('|');
        if width > LINE_WIDTH_MAX && !fixed {
            problems.push(format!("{}:{number}: {width} characters wide", source.path));
        }
    }
    problems
}

/// A function begins with a line that has `fn NAME` and ends with a brace at the same indentation.
fn function_problems(source: &Source) -> Vec<String> {
    let mut problems = Vec::new();
    let mut open: Vec<(usize, usize, String)> = Vec::new();
    for (number, line) in code_lines(&source.text) {
        let trimmed = line.trim_start();
        let indent = line.len() - trimmed.len();
        if trimmed == "}" && open.last().is_some_and(|(at, _, _)| *at == indent) {
            let (_, start, name) = open.pop().unwrap();
            let lines = number - start + 1;
            if lines > FUNCTION_LINES_MAX {
                problems.push(format!(
                    "{}:{start}: fn {name} has {lines} lines, {FUNCTION_LINES_MAX} at most",
                    source.path
                ));
            }
        }
        let words = trimmed.split("fn ").collect::<Vec<_>>();
        let heads =
            ["", "pub ", "pub(crate) ", "pub(super) ", "const ", "pub const ", "async ", "pub async "];
        if words.len() > 1 && heads.contains(&words[0]) && !line.ends_with(';') && !line.ends_with('}') {
            let name = words[1].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            open.retain(|(at, _, _)| *at < indent);
            open.push((indent, number, name));
        }
    }
    problems
}

fn word_problems(source: &Source) -> Vec<String> {
    let mut problems = Vec::new();
    for (number, line) in source.text.lines().enumerate() {
        for word in BANNED_WORDS {
            if line.contains(word) {
                problems.push(format!("{}:{}: says {word:?}", source.path, number + 1));
            }
        }
        if !line.is_ascii() {
            problems.push(format!("{}:{}: is not ASCII", source.path, number + 1));
        }
    }
    problems
}

fn clock_problems(source: &Source) -> Vec<String> {
    let inside = source.path.strip_prefix("src/").unwrap_or(&source.path);
    if inside == CLOCK || is_test_file(&source.path) {
        return Vec::new();
    }
    let mut problems = Vec::new();
    for (number, line) in code_lines(&source.text) {
        let wall = line.contains("SystemTime::now") || line.contains("Timestamp::now");
        let wait = line.contains("Instant::now") && !MAY_MEASURE_WAITS.contains(&inside);
        if wall || wait {
            problems.push(format!("{}:{number}: asks the time; only src/{CLOCK} does", source.path));
        }
    }
    problems
}

fn unsafe_problems(source: &Source) -> Vec<String> {
    let inside = source.path.strip_prefix("src/").unwrap_or(&source.path);
    let mut problems = Vec::new();
    let allows = source.text.contains("allow(unsafe_code)");
    if allows && !MAY_BE_UNSAFE.contains(&inside) {
        problems.push(format!("{}: allows unsafe code and is not listed for it", source.path));
    }
    let sources = source.text.matches("unsafe {").count() + source.text.matches("unsafe impl").count();
    let reasons = source.text.matches("SAFETY:").count();
    if allows && reasons < sources {
        problems.push(format!("{}: {sources} unsafe places, {reasons} reasons", source.path));
    }
    problems
}

/// Disk, wire and people must never reach a panic.
fn panic_problems(source: &Source) -> Vec<String> {
    if is_test_file(&source.path) {
        return Vec::new();
    }
    let mut problems = Vec::new();
    for (number, line) in code_lines(&source.text) {
        for word in [".unwrap()", ".expect(", "panic!(", "unreachable!("] {
            if line.contains(word) {
                problems.push(format!("{}:{number}: {word} outside tests", source.path));
            }
        }
    }
    problems
}

fn none(what: &str, problems: Vec<String>) {
    assert!(problems.is_empty(), "{what}:\n{}", problems.join("\n"));
}

fn each(sources: &[Source], rule: fn(&Source) -> Vec<String>) -> Vec<String> {
    sources.iter().flat_map(rule).collect()
}

#[test]
fn a_file_uses_only_its_own_folder_and_layers_below() {
    none("layer rule", each(&product_files(), layer_problems));
}

#[test]
fn files_and_lines_are_short() {
    let mut sources = rust_files("src");
    sources.extend(rust_files("tests"));
    none("sizes", each(&sources, size_problems));
}

#[test]
fn functions_are_short() {
    none("functions", each(&product_files(), function_problems));
}

#[test]
fn nothing_promises_work_instead_of_doing_it() {
    none("words", each(&all_text(), word_problems));
}

#[test]
fn only_the_clock_asks_the_time() {
    none("clock", each(&product_files(), clock_problems));
}

#[test]
fn unsafe_code_is_in_listed_modules() {
    none("unsafe", each(&rust_files("src"), unsafe_problems));
}

#[test]
fn nothing_panics_outside_tests() {
    none("panics", each(&product_files(), panic_problems));
}

mod the_rules_see_what_breaks_them {
    use super::*;

    fn source(path: &str, text: &str) -> Source {
        Source { path: path.to_owned(), text: text.to_owned() }
    }

    #[test]
    fn layers() {
        assert_eq!(layer_problems(&source("src/core/a.rs", "use crate::host::X;\n")).len(), 1);
        assert_eq!(layer_problems(&source("src/ship/a.rs", "use crate::vault::X;\n")).len(), 1);
        assert_eq!(layer_problems(&source("src/base/a.rs", "use crate::{base::a, core::b};\n")).len(), 1);
        let several = "use crate::{\n    base::{A, B},\n    cli::b,\n};\n";
        assert_eq!(layer_problems(&source("src/host/a.rs", several)).len(), 1);
        assert_eq!(layer_problems(&source("src/else/a.rs", "")).len(), 1);
        let tests = "#[cfg(test)]\nmod tests {\n    use crate::vault::X;\n}\n";
        assert!(layer_problems(&source("src/ship/a.rs", tests)).is_empty());
        assert!(layer_problems(&source("src/ship/a.rs", "use crate::core::ports::Vault;\n")).is_empty());
    }

    #[test]
    fn sizes() {
        let long = "let a = 1;\n".repeat(FILE_LINES_MAX + 1);
        assert_eq!(size_problems(&source("src/a.rs", &long)).len(), 1);
        assert_eq!(size_problems(&source("src/a.rs", &"a".repeat(LINE_WIDTH_MAX + 1))).len(), 1);
        let function = format!("fn a() {{\n{}}}\n", "    b();\n".repeat(FUNCTION_LINES_MAX));
        assert_eq!(function_problems(&source("src/a.rs", &function)).len(), 1);
    }

    #[test]
    fn modules_for_tests_are_known_by_their_parents() {
        let parents = [
            source("src/ship/mod.rs", "#[cfg(test)]\nmod sim;\nmod read;\n"),
            source("src/host/state.rs", "#[cfg(test)]\npub(crate) mod checks;\n"),
        ];
        assert_eq!(test_modules(&parents), ["src/ship/sim", "src/host/state/checks"]);
    }

    #[test]
    fn words_time_unsafe_and_panics() {
        assert_eq!(word_problems(&source("src/a.rs", concat!("// TO", "DO\n"))).len(), 1);
        assert_eq!(word_problems(&source("src/a.rs", "// \u{e9}\n")).len(), 1);
        assert_eq!(clock_problems(&source("src/ship/a.rs", "let t = Instant::now();\n")).len(), 1);
        assert_eq!(unsafe_problems(&source("src/a.rs", "#![allow(unsafe_code)]\n")).len(), 1);
        assert_eq!(panic_problems(&source("src/a.rs", "let a = b.unwrap();\n")).len(), 1);
        let test = "#[cfg(test)]\nmod tests {\n    fn a() {\n        b.unwrap();\n    }\n}\nlet a = b;\n";
        assert_eq!(code_lines(test).len(), 1);
    }
}
