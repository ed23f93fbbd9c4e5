//! Talks to QEMU's monitor.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use super::{PATIENCE, wait_until};

/// A connection to the monitor of a guest.
pub struct Qmp {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    pub fn connect(socket: &Path) -> Self {
        let mut stream = None;
        wait_until("QEMU to listen", || {
            stream = UnixStream::connect(socket).ok();
            stream.is_some()
        });
        let stream = stream.unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let reader = BufReader::new(stream.try_clone().unwrap());
        let mut qmp = Self { stream, reader, events: Vec::new() };
        qmp.read();
        qmp.run("qmp_capabilities", json!({}));
        qmp
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).expect("QEMU answers");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("QEMU said {line:?}: {e}"))
    }

    /// A command that must succeed.
    pub fn run(&mut self, command: &str, arguments: Value) -> Value {
        let line = json!({"execute": command, "arguments": arguments}).to_string();
        self.stream.write_all(line.as_bytes()).and_then(|()| self.stream.write_all(b"\n")).unwrap();
        loop {
            let mut said = self.read();
            if !said["event"].is_null() {
                self.events.push(said);
                continue;
            }
            assert!(said["error"].is_null(), "{command}: {said}");
            return said["return"].take();
        }
    }

    pub fn wait_event(&mut self, event: &str) -> Value {
        loop {
            if let Some(at) = self.events.iter().position(|e| e["event"] == event) {
                return self.events.remove(at);
            }
            let said = self.read();
            self.events.push(said);
        }
    }
}
