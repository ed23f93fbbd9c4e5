//! Where answers go: standard output, as text for people or JSON for scripts.
//!
//! A reader that goes away (`| head`) ends the program quietly; it is no failure.

use std::io::{IsTerminal, Write};

use comfy_table::presets::{NOTHING, UTF8_HORIZONTAL_ONLY};
use comfy_table::{Attribute, Cell, ContentArrangement, Table};
use serde::Serialize;
use serde_json::Value;

use crate::base::error::Context;
use crate::base::{Error, ErrorKind, Result};

/// How to talk.
#[derive(Clone, Copy, Debug)]
pub struct Out {
    /// In JSON.
    pub json: bool,
    /// Prompts are answered with yes.
    pub yes: bool,
    /// Standard output is a terminal.
    pub terminal: bool,
}

impl Out {
    /// As the arguments and the terminal say.
    pub fn new(json: bool, yes: bool) -> Self {
        Self { json, yes, terminal: std::io::stdout().is_terminal() }
    }

    /// Prints a text and a line end.
    pub fn line(&self, text: &str) -> Result<()> {
        self.write(&format!("{text}\n"))
    }

    /// Prints `text` as it is.
    pub fn write(&self, text: &str) -> Result<()> {
        let mut stdout = std::io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
            other => other.context(|| "cannot write to standard output"),
        }
    }

    /// With `--json`, prints `value` under `schema`, unless it names one itself; else `words`.
    pub fn answer<T: Serialize>(
        &self,
        schema: &str,
        value: &T,
        words: impl FnOnce() -> String,
    ) -> Result<()> {
        if self.json {
            return self.write(&json(schema, value)?);
        }
        let text = words();
        if text.is_empty() { Ok(()) } else { self.line(text.trim_end()) }
    }

    /// A table for the terminal, aligned text when piped.
    pub fn table(&self, header: &[&str], rows: &[Vec<String>]) -> String {
        let mut table = Table::new();
        if self.terminal {
            table.load_style(UTF8_HORIZONTAL_ONLY);
            table.set_content_arrangement(ContentArrangement::Dynamic);
            table.set_header(header.iter().map(|h| Cell::new(h).add_attribute(Attribute::Bold)));
        } else {
            table.load_style(NOTHING);
            table.force_no_tty();
            table.set_content_arrangement(ContentArrangement::Disabled);
            table.set_header(header.iter().copied());
        }
        table.add_rows(rows.iter().map(|row| row.iter().map(|cell| plain(cell))));
        let text = if self.terminal { table.to_string() } else { table.trim_fmt() };
        let lines = text.lines().map(|l| if self.terminal { l } else { l.trim_end() });
        lines.map(|l| l.strip_prefix(if self.terminal { "" } else { " " }).unwrap_or(l)).fold(
            String::new(),
            |mut all, line| {
                all.push_str(line);
                all.push('\n');
                all
            },
        )
    }

    /// Asks the person to type `expected`; `--yes` has typed it.
    pub fn confirm(&self, warning: &str, expected: &str) -> Result<()> {
        if self.yes {
            return Ok(());
        }
        eprint!("{warning}\nType {expected} to go on: ");
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).context(|| "cannot read the answer")?;
        if line.trim() == expected {
            return Ok(());
        }
        if line.is_empty() {
            eprintln!();
        }
        Err(Error::new(ErrorKind::Refused, "nothing was done")
            .why(format!("{expected:?} was not typed"))
            .hint("type it when asked, or say --yes"))
    }
}

/// `value` as one JSON object with a `schema`.
pub fn json<T: Serialize>(schema: &str, value: &T) -> Result<String> {
    let internal = |e| Error::new(ErrorKind::Internal, "the answer cannot be written as JSON").source(e);
    let mut value = serde_json::to_value(value).map_err(internal)?;
    if let Value::Object(fields) = &mut value
        && !fields.contains_key("schema")
    {
        fields.insert("schema".to_owned(), Value::String(schema.to_owned()));
    }
    Ok(serde_json::to_string_pretty(&value).map_err(internal)? + "\n")
}

/// Text without control characters: a file name must not command the terminal.
pub fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn piped_tables_are_plain_and_aligned() {
        let out = Out { json: false, yes: false, terminal: false };
        let rows = vec![vec!["a".to_owned(), "1".to_owned()], vec!["long\u{1b}".to_owned(), String::new()]];
        assert_eq!(out.table(&["NAME", "N"], &rows), "NAME   N\na      1\nlong?\n");
    }

    #[test]
    fn json_has_a_schema() {
        let text = json("x/1", &serde_json::json!({"a": 1})).unwrap();
        let v: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(v["schema"], "x/1");
    }
}
