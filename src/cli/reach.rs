//! Reaches the daemon, and starts it where a command needs it.
//!
//! Started by hand it leaves the session of the terminal and writes its log to `daemon.log` in
//! the state folder; on a host where systemd has a unit for it, systemd starts it. Of two commands
//! that would start it at once, one does, and both then talk to it. Killed here: the kernel gives
//! the locks back, and the daemon goes on or never began.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

use crate::base::error::Context;
use crate::base::shell::shell;
use crate::base::{Clock, Error, ErrorKind, Result, SystemClock};
use crate::host::api::Client;
use crate::host::state::{STATE_DIR_DEFAULT, StateDir};

/// A daemon that starts serves within this time, also when it has much to look through.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at the socket.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// A log longer than this is put aside when a daemon starts, in bytes.
const LOG_BYTES_MAX: u64 = 16 << 20;
/// Lines of the log that an error quotes.
const LOG_LINES_QUOTED: usize = 3;

/// The daemon of a state folder.
pub struct Reach {
    state: StateDir,
    verbose: u8,
}

impl Reach {
    /// The daemon of the state folder at `root`.
    pub fn new(root: &Path, verbose: u8) -> Result<Self> {
        Ok(Self { state: StateDir::at(root)?, verbose })
    }

    /// The state folder.
    pub fn state(&self) -> &StateDir {
        &self.state
    }

    /// For a command that changes something: starts the daemon if none runs.
    pub fn needed(&self) -> Result<Client> {
        need_root()?;
        let client = Client::new(&self.state.socket())?;
        match client.hello() {
            Ok(_) => Ok(client),
            Err(e) if e.kind() == ErrorKind::NoDaemon => self.start(client),
            Err(e) => Err(e),
        }
    }

    /// For a command that only looks: starts the daemon only where there is something to look at,
    /// which is a state folder that a daemon has used before.
    pub fn running(&self) -> Result<Client> {
        let client = Client::new(&self.state.socket())?;
        match client.hello() {
            Ok(_) => Ok(client),
            Err(e) if e.kind() == ErrorKind::NoDaemon => {
                if is_root() && self.state.root().join("lock").exists() {
                    return self.start(client);
                }
                Err(self.none_runs())
            }
            Err(e) => Err(e),
        }
    }

    /// Whoever runs now; starts nothing.
    pub fn if_running(&self) -> Option<Client> {
        let client = Client::new(&self.state.socket()).ok()?;
        client.hello().ok().map(|_| client)
    }

    fn none_runs(&self) -> Error {
        Error::new(ErrorKind::NoDaemon, "the daemon does not run")
            .why(format!("nobody answers on {}", self.state.socket().display()))
            .hint(format!("start it: {} start", self.program()))
    }

    /// How this daemon's commands begin.
    fn program(&self) -> String {
        if self.state.root() == Path::new(STATE_DIR_DEFAULT) {
            return "afterimage".to_owned();
        }
        format!("afterimage --state {}", shell(self.state.root()))
    }

    fn start(&self, client: Client) -> Result<Client> {
        if self.has_unit() {
            return self.start_unit(client);
        }
        self.state.create()?;
        // One starter at a time, so that no second daemon is left waiting for the first to end.
        let _starter = self.only_starter()?;
        if self.await_predecessor(&client)? {
            return Ok(client);
        }
        self.spawn(client)
    }

    fn only_starter(&self) -> Result<Flock<File>> {
        let path = self.state.root().join("start.lock");
        let what = || format!("cannot lock {}", path.display());
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true).mode(0o600);
        let file = options.open(&path).context(what)?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| Error::io(what(), e.into()))
    }

    /// Waits while some daemon holds the lock of the state folder: one that starts, or one that
    /// ends. `true`: it answers; `false`: it is gone.
    fn await_predecessor(&self, client: &Client) -> Result<bool> {
        let clock = SystemClock::default();
        loop {
            match client.hello() {
                Ok(_) => return Ok(true),
                Err(e) if e.kind() != ErrorKind::NoDaemon => return Err(e),
                Err(_) => {}
            }
            match self.state.lock(Duration::ZERO) {
                Ok(_) => return Ok(false),
                Err(e) if e.kind() != ErrorKind::Busy || clock.monotonic() > START_PATIENCE => {
                    return Err(e.why("a daemon holds its lock and does not answer"));
                }
                Err(_) => std::thread::sleep(LOOK_AGAIN),
            }
        }
    }

    fn spawn(&self, client: Client) -> Result<Client> {
        let log = self.state.log();
        if std::fs::metadata(&log).is_ok_and(|m| m.len() > LOG_BYTES_MAX) {
            let _ = std::fs::rename(&log, log.with_extension("log.1"));
        }
        let what = || format!("cannot open {}", log.display());
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&log).context(what)?;
        let begin = file.metadata().context(what)?.len();
        let program = std::env::current_exe().context(|| "cannot find the program itself")?;
        let mut command = Command::new(program);
        command.arg("--state").arg(self.state.root());
        for _ in 0..self.verbose {
            command.arg("-v");
        }
        command.args(["daemon", "--detached"]).current_dir("/").stdin(Stdio::null());
        command.stdout(file.try_clone().context(what)?).stderr(file);
        let mut child = command.spawn().context(|| "cannot start the daemon")?;
        self.await_start(client, &mut child, begin)
    }

    fn await_start(&self, client: Client, child: &mut Child, log_begin: u64) -> Result<Client> {
        let clock = SystemClock::default();
        let mut exited = None;
        loop {
            match client.hello() {
                Ok(_) => return Ok(client),
                Err(e) if e.kind() != ErrorKind::NoDaemon => return Err(e),
                Err(_) => {}
            }
            // One more look after it is gone: another daemon may have taken the lock and answer.
            if let Some(status) = exited {
                let why = self.last_words(log_begin);
                return Err(Error::new(ErrorKind::NoDaemon, "the daemon did not start")
                    .why(format!("{status}: {why}"))
                    .hint(format!("see {}", self.state.log().display())));
            }
            exited = child.try_wait().context(|| "cannot wait for the daemon")?;
            if clock.monotonic() > START_PATIENCE {
                return Err(Error::new(ErrorKind::NoDaemon, "the daemon does not answer yet")
                    .why(format!("it was started {} s ago (pid {})", START_PATIENCE.as_secs(), child.id()))
                    .hint(format!("see {}", self.state.log().display())));
            }
            if exited.is_none() {
                std::thread::sleep(LOOK_AGAIN);
            }
        }
    }

    /// The last lines that the daemon logged since `begin` (bytes).
    fn last_words(&self, begin: u64) -> String {
        let text = std::fs::read(self.state.log()).unwrap_or_default();
        let new = text.get(usize::try_from(begin).unwrap_or(0)..).unwrap_or_default();
        let text = String::from_utf8_lossy(new);
        let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
        match lines.len() {
            0 => "it said nothing".to_owned(),
            n => {
                let last = lines.get(n.saturating_sub(LOG_LINES_QUOTED)..).unwrap_or_default();
                last.iter().map(|l| l.trim()).collect::<Vec<_>>().join("; ")
            }
        }
    }

    fn has_unit(&self) -> bool {
        let folders = ["/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"];
        self.state.root() == Path::new(STATE_DIR_DEFAULT)
            && Path::new("/run/systemd/system").is_dir()
            && folders.iter().any(|d| Path::new(d).join("afterimage.service").exists())
    }

    fn start_unit(&self, client: Client) -> Result<Client> {
        let failed = |why: String| {
            Error::new(ErrorKind::NoDaemon, "the daemon did not start")
                .why(why)
                .hint("systemctl status afterimage; journalctl -u afterimage")
        };
        let status = Command::new("systemctl")
            .args(["start", "afterimage.service"])
            .status()
            .map_err(|e| failed(format!("systemctl cannot be run: {e}")))?;
        if !status.success() {
            return Err(failed(format!("systemctl start afterimage: {status}")));
        }
        let clock = SystemClock::default();
        loop {
            match client.hello() {
                Ok(_) => return Ok(client),
                Err(e) if clock.monotonic() > START_PATIENCE => return Err(failed(e.to_string())),
                Err(_) => std::thread::sleep(LOOK_AGAIN),
            }
        }
    }
}

/// Whether this is root.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Refuses whoever is not root.
pub fn need_root() -> Result<()> {
    if is_root() {
        return Ok(());
    }
    let mut words = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
    words.insert_str(0, "sudo afterimage ");
    Err(Error::new(ErrorKind::Refused, "this command is for root")
        .why("it mounts, or changes what is protected")
        .hint(words))
}
