//! Asks the daemon: one connection per call, from ordinary blocking code.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::commands::Call;
use super::socket::Address;
use super::types::{DaemonStatus, Failure, HelloRequest};
use crate::base::error::Context;
use crate::base::{Error, ErrorKind, Result};

/// Largest answer that is accepted, in bytes.
const REPLY_BYTES_MAX: usize = 256 << 20;
/// A daemon that runs says hello within this time.
const HELLO_PATIENCE: Duration = Duration::from_secs(20);

/// The daemon behind one socket, which need not run.
pub struct Client {
    runtime: Runtime,
    socket: PathBuf,
}

impl Client {
    /// The daemon that serves, or will serve, on `socket`.
    pub fn new(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context(|| "cannot ask the daemon")?;
        Ok(Self { runtime, socket: socket.to_owned() })
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks who answers. [`ErrorKind::NoDaemon`]: nobody.
    pub fn hello(&self) -> Result<DaemonStatus> {
        self.runtime.block_on(async {
            match tokio::time::timeout(HELLO_PATIENCE, self.ask(&HelloRequest {})).await {
                Ok(answer) => answer,
                Err(_) => Err(Error::new(ErrorKind::Busy, "the daemon does not answer")
                    .why(format!("it has said nothing for {} s", HELLO_PATIENCE.as_secs()))
                    .hint(
                        "see the daemon's log: journalctl -u afterimage, or daemon.log in its state folder",
                    )),
            }
        })
    }

    /// Makes a call and waits for the answer, however long it takes.
    pub fn call<C: Call>(&self, request: &C) -> Result<C::Reply> {
        self.runtime.block_on(self.ask(request))
    }

    /// From now on Ctrl-C no longer ends the program; it is told here.
    pub fn interrupts(&self) -> Result<Interrupts<'_>> {
        let _inside = self.runtime.enter();
        let signal = signal(SignalKind::interrupt()).context(|| "cannot listen for Ctrl-C")?;
        Ok(Interrupts { runtime: &self.runtime, signal })
    }

    async fn ask<C: Call>(&self, request: &C) -> Result<C::Reply> {
        let body = serde_json::to_vec(request).map_err(|e| {
            Error::new(ErrorKind::Usage, format!("{} cannot be asked for", C::NAME))
                .source(e)
                .hint("use paths that are UTF-8")
        })?;
        let (status, reply) = self.exchange(C::NAME, body).await?;
        if status == StatusCode::OK {
            return serde_json::from_slice(&reply).map_err(|e| mismatch(C::NAME, &e.to_string()));
        }
        match serde_json::from_slice::<Failure>(&reply) {
            Ok(failure) => Err(failure.into()),
            Err(_) => Err(mismatch(C::NAME, &format!("{status}: {}", String::from_utf8_lossy(&reply)))),
        }
    }

    async fn exchange(&self, call: &str, body: Vec<u8>) -> Result<(StatusCode, Bytes)> {
        let address = Address::of(&self.socket).map_err(|e| self.no_daemon(e))?;
        let stream = match UnixStream::connect(address.path()).await {
            Ok(stream) => stream,
            Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
                return Err(Error::io("the daemon cannot be asked", e)
                    .with_kind(ErrorKind::Refused)
                    .hint("sudo afterimage ..."));
            }
            Err(e) => return Err(self.no_daemon(e)),
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let connection = tokio::spawn(connection);
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("/v1/{call}"))
            .header(hyper::header::HOST, "afterimage")
            .header(hyper::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| Error::new(ErrorKind::Internal, "the call cannot be made").source(e))?;
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), REPLY_BYTES_MAX);
        let reply = body
            .collect()
            .await
            .map_err(|e| Error::new(ErrorKind::NoDaemon, "the daemon ended while it answered").source(e))?;
        connection.abort();
        Ok((status, reply.to_bytes()))
    }

    fn no_daemon(&self, cause: impl std::fmt::Display) -> Error {
        Error::new(ErrorKind::NoDaemon, "the daemon does not run")
            .why(format!("nobody answers on {}: {cause}", self.socket.display()))
            .hint("systemctl start afterimage, or any command that needs it: afterimage mount DIR")
    }
}

/// Ctrl-C as a value.
pub struct Interrupts<'a> {
    runtime: &'a Runtime,
    signal: Signal,
}

impl Interrupts<'_> {
    /// Waits; `true`: Ctrl-C was typed, `false`: not within `patience`.
    pub fn arrive_within(&mut self, patience: Duration) -> bool {
        let Self { runtime, signal } = self;
        runtime.block_on(async { tokio::time::timeout(patience, signal.recv()).await.is_ok() })
    }
}

fn broken(e: hyper::Error) -> Error {
    Error::new(ErrorKind::NoDaemon, "the daemon ended while it was asked")
        .source(e)
        .hint("see the daemon's log: journalctl -u afterimage, or daemon.log in its state folder")
}

fn mismatch(call: &str, why: &str) -> Error {
    Error::new(ErrorKind::Version, format!("the answer to {call} cannot be understood"))
        .why(why)
        .hint("the daemon is of another version; restart it: afterimage stop, then any command")
}
