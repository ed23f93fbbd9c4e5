//! QEMU on the small guest of `scripts/guest`: a Linux that writes numbered records, and checks at
//! boot all that it ever wrote.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};

use super::{Kind, PATIENCE, Scratch, Volume, package, run, text};

/// A guest at work. Dropping it pulls its plug.
pub struct Guest {
    process: Child,
    console: Arc<Console>,
}

#[derive(Default)]
struct Console {
    lines: Mutex<(Vec<String>, bool)>,
    changed: Condvar,
}

impl Guest {
    /// A fresh disk of the guest at `path`.
    pub fn disk(path: &Path, format: &str) {
        run(text(&package().join("scripts/guest")), &["new", text(path), format]);
    }

    /// Boots from `disk`. `records`: it powers off after so many more; 0: never.
    pub fn boot(disk: &Path, format: &str, cache: &str, mode: &str, records: u64, more: &[&str]) -> Self {
        let mut process = Command::new(package().join("scripts/run-guest"))
            .args([text(disk), format, cache, mode, &records.to_string()])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let console = Arc::new(Console::default());
        let (writer, output) = (console.clone(), process.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n') {
                let Ok(line) = line else { break };
                writer.add(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            writer.lines.lock().unwrap().1 = true;
            writer.changed.notify_all();
        });
        Self { process, console }
    }

    /// Waits for a line that begins with `start`; what follows in it.
    pub fn wait_for(&self, start: &str) -> String {
        self.console.wait(start, &|line| line.strip_prefix(start).map(str::to_owned))
    }

    /// The number of the last record that the guest has synced, at least `number`.
    pub fn wait_synced(&self, number: u64) -> u64 {
        let wanted = format!("SYNCED {number} or later");
        self.console.wait(&wanted, &|line| synced(line).filter(|n| *n >= number));
        self.synced()
    }

    pub fn synced(&self) -> u64 {
        let lines = self.console.lines.lock().unwrap();
        lines.0.iter().rev().find_map(|line| synced(line)).unwrap_or(0)
    }

    /// Boots a disk only to check it; the number of records found.
    pub fn verify(disk: &Path, format: &str) -> u64 {
        let guest = Self::boot(disk, format, "writeback", "verify", 0, &[]);
        let said = guest.wait_for("GUEST-VERIFIED records=");
        guest.wait_for("GUEST-DONE");
        said.split(' ').next().unwrap().parse().unwrap()
    }

    /// The number of records on a disk of the guest that is not running, read here on the host: as
    /// after a power cut, the log of its file system is replayed, and every record must be right.
    pub fn records(disk: &Path, format: &str, scratch: &Scratch) -> u64 {
        let raw = scratch.path().join("records.raw");
        run("qemu-img", &["convert", "-q", "-f", format, "-O", "raw", text(disk), text(&raw)]);
        let dir = scratch.dir("records");
        let volume = Volume::attach(&raw, Kind::Ext4, &dir);
        let log = std::fs::read_to_string(volume.dir().join("records/log")).unwrap();
        // What a cut left of a record that had not been synced ends without a line feed.
        let whole = &log[..log.rfind('\n').map_or(0, |at| at + 1)];
        let mut number = 0;
        for line in whole.lines() {
            number += 1;
            let mut words = line.split(' ');
            assert_eq!(words.next(), Some(number.to_string().as_str()), "record {number} is {line:?}");
            assert_eq!(words.next(), Some(pattern(number).as_str()), "record {number}");
            if let Some(sum) = words.next() {
                let file = volume.dir().join(format!("records/file.{number}"));
                let found = run("md5sum", &[text(&file)]);
                assert!(found.starts_with(sum), "file {number}: {found} instead of {sum}");
            }
        }
        volume.check();
        number
    }

    /// Pulls the plug.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The content of a record; the same function as in the guest.
fn pattern(number: u64) -> String {
    let mut x = number;
    let words = (0..12).map(|i| {
        x = (x * 69_069 + 12_345 + i) % (1 << 31);
        format!("{x:08x}")
    });
    words.collect()
}

fn synced(line: &str) -> Option<u64> {
    line.strip_prefix("SYNCED ")?.parse().ok()
}

impl Console {
    fn add(&self, line: String) {
        self.lines.lock().unwrap().0.push(line);
        self.changed.notify_all();
    }

    fn wait<T>(&self, what: &str, find: &dyn Fn(&str) -> Option<T>) -> T {
        let start = std::time::Instant::now();
        let mut lines = self.lines.lock().unwrap();
        let mut next = 0;
        loop {
            for line in &lines.0[next..] {
                assert!(!line.starts_with("GUEST-BAD"), "the guest says {line}");
                if let Some(found) = find(line) {
                    return found;
                }
            }
            next = lines.0.len();
            assert!(!lines.1, "the guest ended without {what}; it said:\n{}", lines.0.join("\n"));
            assert!(start.elapsed() < PATIENCE, "no {what}; the guest said:\n{}", lines.0.join("\n"));
            lines = self.changed.wait_timeout(lines, PATIENCE / 10).unwrap().0;
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.end();
    }
}
