//! Answers the calls of the API on the Unix socket, with the rights of whoever connected.
//!
//! Root may do everything, members of one group may read, everybody else is refused: by the mode
//! of the socket, and again by the peer's credentials, which the kernel vouches for. Engine calls
//! block and run on threads of their own; two threads named `api` do the rest.
//!
//! Killed here: the socket file stays; the next daemon, which holds the lock of the state folder,
//! replaces it. Disk full: nothing here writes.

use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::{Path as UrlPath, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::serve::IncomingStream;
use nix::unistd::{Gid, Group, Uid, User};
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

use super::commands::{Access, Commands, access, dispatch};
use super::socket::Address;
use super::types::Failure;
use crate::base::error::Context;
use crate::base::{Error, ErrorKind, Result};

/// Calls in progress get so long to end when the server stops.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
/// Threads that may be inside the engine at once.
const CALLS_AT_ONCE_MAX: usize = 128;

/// The running server.
pub struct Server {
    runtime: Runtime,
    stop: oneshot::Sender<()>,
    serving: tokio::task::JoinHandle<()>,
    socket: PathBuf,
}

#[derive(Clone)]
struct Door {
    engine: Arc<dyn Commands>,
    group: Option<Gid>,
}

/// Who connected, as the kernel says.
#[derive(Clone, Copy, Debug)]
struct Peer {
    uid: Option<u32>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self { uid: stream.io().peer_cred().ok().map(|c| c.uid()) }
    }
}

impl Server {
    /// Serves `engine` on a socket at `socket`; the members of `group`, if it exists, may read.
    ///
    /// The caller holds the lock of the state folder: a socket that is there is a dead one.
    pub fn start(socket: &Path, group: &str, engine: Arc<dyn Commands>) -> Result<Self> {
        let what = || format!("cannot serve on {}", socket.display());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(CALLS_AT_ONCE_MAX)
            .thread_name("api")
            .enable_all()
            .build()
            .context(what)?;
        let group = Group::from_name(group).ok().flatten().map(|g| g.gid);
        match std::fs::remove_file(socket) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(what(), e)),
            _ => {}
        }
        let address = Address::of(socket)?;
        let listener = {
            let _inside = runtime.enter();
            UnixListener::bind(address.path()).context(what)?
        };
        std::fs::set_permissions(socket, Permissions::from_mode(0o660)).context(what)?;
        if let Some(gid) = group {
            chown(socket, None, Some(gid.as_raw())).context(what)?;
        }
        let app = Router::new().route("/v1/{call}", post(answer)).with_state(Door { engine, group });
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = runtime.spawn(async move {
            let service = app.into_make_service_with_connect_info::<Peer>();
            let until = async {
                let _ = stopped.await;
            };
            if let Err(e) = axum::serve(listener, service).with_graceful_shutdown(until).await {
                log::error!("the API ended: {e}");
            }
        });
        Ok(Self { runtime, stop, serving, socket: socket.to_owned() })
    }

    /// Stops: no new calls; those in progress get five seconds to be answered.
    pub fn stop(self) {
        let Self { runtime, stop, serving, socket } = self;
        let _ = std::fs::remove_file(&socket);
        let _ = stop.send(());
        let ended = runtime.block_on(async { tokio::time::timeout(STOP_PATIENCE, serving).await });
        if ended.is_err() {
            log::warn!("calls were still in progress when the API stopped");
        }
        runtime.shutdown_background();
    }
}

async fn answer(
    State(door): State<Door>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    UrlPath(call): UrlPath<String>,
    body: Bytes,
) -> Response {
    let work = tokio::task::spawn_blocking(move || {
        door.admit(peer, &call)?;
        dispatch(&*door.engine, &call, &body)
    });
    let result = work.await.unwrap_or_else(|e| {
        Err(Error::new(ErrorKind::Internal, "the daemon failed to answer")
            .source(e)
            .hint("see the daemon's log, and report this"))
    });
    match result {
        Ok(json) => (StatusCode::OK, [(header::CONTENT_TYPE, "application/json")], json).into_response(),
        Err(e) => (status_of(e.kind()), axum::Json(Failure::from(&e))).into_response(),
    }
}

impl Door {
    fn admit(&self, peer: Peer, call: &str) -> Result<()> {
        let uid = peer.uid.map(Uid::from_raw);
        if uid.is_some_and(|u| u.is_root() || u == Uid::effective()) {
            return Ok(());
        }
        let reads = access(call) != Some(Access::Write);
        if reads && uid.is_some_and(|u| self.group.is_some_and(|g| is_member(u, g))) {
            return Ok(());
        }
        let why = if reads { "it is for root and the group afterimage" } else { "it is for root" };
        Err(Error::new(ErrorKind::Refused, format!("{call} is not allowed for this user"))
            .why(why)
            .hint("sudo afterimage ..."))
    }
}

fn is_member(uid: Uid, group: Gid) -> bool {
    let Ok(Some(user)) = User::from_uid(uid) else { return false };
    let Ok(name) = std::ffi::CString::new(user.name) else { return false };
    nix::unistd::getgrouplist(&name, user.gid).is_ok_and(|groups| groups.contains(&group))
}

const fn status_of(kind: ErrorKind) -> StatusCode {
    match kind {
        ErrorKind::Usage | ErrorKind::Configuration => StatusCode::BAD_REQUEST,
        ErrorKind::Refused => StatusCode::FORBIDDEN,
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::Exists | ErrorKind::Busy => StatusCode::CONFLICT,
        ErrorKind::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
        ErrorKind::Unreachable => StatusCode::BAD_GATEWAY,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::sync::{Mutex, PoisonError};

    use super::super::client::Client;
    use super::super::types::*;
    use super::*;

    #[derive(Default)]
    struct Fake {
        entered: Option<Mutex<Sender<()>>>,
        released: Option<Mutex<Receiver<()>>>,
    }

    impl Commands for Fake {
        fn hello(&self, _: HelloRequest) -> Result<DaemonStatus> {
            Ok(DaemonStatus { pid: 7, version: "1".into(), uptime_seconds: 3, state_dir: "/s".into() })
        }

        fn pause(&self, request: PauseRequest) -> Result<Done> {
            assert_ne!(request.vm, "panic");
            Err(Error::new(ErrorKind::NotFound, format!("there is no VM {:?}", request.vm))
                .why("nobody protected it")
                .hint("afterimage status"))
        }

        fn resume(&self, _: ResumeRequest) -> Result<Done> {
            if let (Some(entered), Some(released)) = (&self.entered, &self.released) {
                entered.lock().unwrap_or_else(PoisonError::into_inner).send(()).unwrap();
                let _ = released.lock().unwrap_or_else(PoisonError::into_inner).recv();
            }
            Ok(Done::default())
        }
    }

    fn serve(socket: &Path) -> (Server, Client) {
        let server = Server::start(socket, "no such group", Arc::new(Fake::default())).unwrap();
        (server, Client::new(socket).unwrap())
    }

    #[test]
    fn answers_failures_and_panics_cross_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("a.sock");
        let (server, client) = serve(&socket);
        assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o660);
        assert_eq!(client.hello().unwrap().pid, 7);
        let e = client.call(&PauseRequest { vm: "web1".into() }).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NotFound);
        assert_eq!(e.what(), "there is no VM \"web1\"");
        assert_eq!(e.reason().unwrap(), "nobody protected it");
        assert_eq!(e.next_step().unwrap(), "afterimage status");
        let e = client.call(&PauseRequest { vm: "panic".into() }).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Internal);
        server.stop();
        assert_eq!(client.hello().unwrap_err().kind(), ErrorKind::NoDaemon);
        let (server, client) = serve(&socket);
        assert_eq!(client.hello().unwrap().uptime_seconds, 3);
        server.stop();
    }

    #[test]
    fn a_socket_with_a_long_path_is_reached() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(120)).join("y".repeat(120));
        std::fs::create_dir_all(&long).unwrap();
        let (server, client) = serve(&long.join("a.sock"));
        assert_eq!(client.hello().unwrap().pid, 7);
        server.stop();
    }

    #[test]
    fn a_call_in_progress_is_answered_when_the_server_stops() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("a.sock");
        let (entered_tx, entered) = channel();
        let (release, released) = channel();
        let fake = Fake { entered: Some(Mutex::new(entered_tx)), released: Some(Mutex::new(released)) };
        let server = Server::start(&socket, "no such group", Arc::new(fake)).unwrap();
        let client = Client::new(&socket).unwrap();
        let asking = std::thread::spawn(move || client.call(&ResumeRequest { vm: "a".into() }));
        entered.recv().unwrap();
        let stopping = std::thread::spawn(move || server.stop());
        release.send(()).unwrap();
        assert_eq!(asking.join().unwrap().unwrap(), Done::default());
        stopping.join().unwrap();
    }

    #[test]
    fn others_are_refused_and_the_group_reads() {
        let user = User::from_name("nobody").unwrap().unwrap();
        let peer = Peer { uid: Some(user.uid.as_raw()) };
        let member = Door { engine: Arc::new(Fake::default()), group: Some(user.gid) };
        assert!(member.admit(peer, "status").is_ok());
        assert_eq!(member.admit(peer, "umount").unwrap_err().kind(), ErrorKind::Refused);
        let stranger = Door { engine: Arc::new(Fake::default()), group: Some(Gid::from_raw(0)) };
        assert_eq!(stranger.admit(peer, "status").unwrap_err().kind(), ErrorKind::Refused);
        assert!(stranger.admit(Peer { uid: Some(0) }, "umount").is_ok());
        assert_eq!(stranger.admit(Peer { uid: None }, "status").unwrap_err().kind(), ErrorKind::Refused);
    }

    #[test]
    fn an_older_daemon_says_so() {
        let fake = Fake::default();
        assert_eq!(dispatch(&fake, "failover", b"").unwrap_err().kind(), ErrorKind::NotFound);
        let e = dispatch(&fake, "pause", b"{\"vm\":\"a\",\"new\":1}").unwrap_err();
        assert!(e.reason().unwrap().contains("unknown field `new`"), "{e}");
        assert!(dispatch(&fake, "hello", b"").is_ok());
    }
}
