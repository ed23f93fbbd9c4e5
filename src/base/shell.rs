//! Paths in the lines that a person is told to type.

use std::path::Path;

/// A path as one word of a shell command.
pub fn shell(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,=".contains(c);
    match !text.is_empty() && text.chars().all(plain) {
        true => text,
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_one_word() {
        assert_eq!(shell(Path::new("/a-b/c")), "/a-b/c");
        assert_eq!(shell(Path::new("/a b'c")), r"'/a b'\''c'");
        assert_eq!(shell(Path::new("")), "''");
    }
}
