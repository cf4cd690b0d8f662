//! An OCI registry on loopback, with faults and a link of limited speed.
//!
//! It speaks the distribution API 1.1 over HTTP/1.1, with or without TLS. A second listener, "the CDN",
//! serves blobs that are redirected. Nothing in it is random: the same requests in the same order
//! meet the same faults.

mod answer;
mod auth;
mod body;
mod connection;
mod faults;
mod link;
mod log;
mod path;
mod range;
mod serve;
mod store;
mod tls;
mod uploads;

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use bytes::Bytes;
use oci::Digest;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

pub use auth::{Auth, BearerAuth, Credentials};
pub use faults::{Fault, FaultId, Faults, Outage, Scope, Times};
pub use link::Link;
pub use log::RequestLog;
pub use store::Storage;

use connection::{Listener, Reservation};
use serve::{Server, Side};

/// How a registry begins. Auth, referrers and the link can be changed while it runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where to listen; with port 0, the default, on a free one of loopback.
    pub address: SocketAddr,
    /// Whether to speak TLS, with a certificate by [`Registry::ca_pem`].
    pub tls: bool,
    /// Where uploaded blobs go.
    pub storage: Storage,
    /// What clients must prove.
    pub auth: Auth,
    /// Whether there is a referrers API.
    pub referrers: bool,
    /// The way to the clients.
    pub link: Link,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            tls: false,
            storage: Storage::Memory,
            auth: Auth::None,
            referrers: true,
            link: Link::UNLIMITED,
        }
    }
}

/// A running registry.
///
/// Usable from synchronous and asynchronous code: it has a thread of its own. Dropping it closes all
/// connections and waits for the thread.
#[derive(Debug)]
pub struct Registry {
    server: Arc<Server>,
    ca_pem: Option<String>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Registry {
    /// Starts to listen.
    ///
    /// # Errors
    /// The address is not available, the storage folder cannot be made, or there are no threads or
    /// descriptors left.
    pub fn start(options: Options) -> io::Result<Self> {
        let Options { address, tls, storage, auth, referrers, link } = options;
        let identity = tls.then(|| tls::make_identity(address.ip())).transpose()?;
        let (acceptor, ca_pem) = identity.map(|made| (made.acceptor, made.ca_pem)).unzip();
        let reserved = Reservation::new(address)?;
        let cdn_reserved = Reservation::new(SocketAddr::new(address.ip(), 0))?;
        let server = Arc::new(Server {
            store: store::Store::new(storage)?,
            faults: Faults::new(auth, referrers),
            pacer: link::Pacer::new(link),
            log: log::Log::default(),
            tokens: auth::Tokens::default(),
            scheme: if tls { "https" } else { "http" },
            address: reserved.address,
            cdn_address: cdn_reserved.address,
        });
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = mpsc::channel();
        let shared = Arc::clone(&server);
        let work = move || {
            run(&shared, [reserved, cdn_reserved], acceptor.as_ref(), &ready, stopped);
        };
        let thread = std::thread::Builder::new().name("testkit-registry".to_owned()).spawn(work)?;
        let registry = Self { server, ca_pem, stop: Some(stop), thread: Some(thread) };
        // Without an answer the thread has panicked; dropping the registry joins it.
        is_ready.recv().map_err(io::Error::other)??;
        Ok(registry)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.server.address
    }

    /// Where redirected blobs come from.
    #[must_use]
    pub fn cdn_address(&self) -> SocketAddr {
        self.server.cdn_address
    }

    /// `http` or `https`.
    #[must_use]
    pub fn scheme(&self) -> &'static str {
        self.server.scheme
    }

    /// What image references begin with, such as `127.0.0.1:5000`.
    #[must_use]
    pub fn reference_prefix(&self) -> String {
        self.server.address.to_string()
    }

    /// The certificate of the authority that clients must trust; `None` without TLS.
    #[must_use]
    pub fn ca_pem(&self) -> Option<&str> {
        self.ca_pem.as_deref()
    }

    /// What is wrong with it.
    #[must_use]
    pub fn faults(&self) -> &Faults {
        &self.server.faults
    }

    /// Changes the link. Bodies under way are paced by the new one.
    pub fn set_link(&self, link: Link) {
        self.server.pacer.set_link(link);
    }

    /// Stores a blob, in memory.
    pub fn put_blob(&self, bytes: impl Into<Bytes>) -> Digest {
        self.server.store.put_blob(bytes.into())
    }

    /// Serves a file as a blob. The file is read now, once, for its digest, and then for each request;
    /// it may be unlinked, but must not be changed.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn put_blob_file(&self, path: impl AsRef<Path>) -> io::Result<Digest> {
        self.server.store.put_blob_file(path.as_ref())
    }

    /// Whether a blob is here.
    #[must_use]
    pub fn has_blob(&self, digest: Digest) -> bool {
        self.server.store.blob(digest).is_some()
    }

    /// Deletes a blob and says whether there was one.
    pub fn delete_blob(&self, digest: Digest) -> bool {
        self.server.store.delete_blob(digest)
    }

    /// Stores a manifest, without looking into it, and tags it.
    pub fn put_manifest(
        &self,
        repository: &str,
        tag: Option<&str>,
        media_type: &str,
        bytes: impl Into<Bytes>,
    ) -> Digest {
        self.server.store.put_manifest(repository, tag, media_type, bytes.into())
    }

    /// All requests so far in the order of their arrival.
    #[must_use]
    pub fn requests(&self) -> Vec<RequestLog> {
        self.server.log.snapshot()
    }

    /// Forgets all requests so far; the counters begin at zero again.
    pub fn clear_requests(&self) {
        self.server.log.clear();
    }

    /// Bytes of blobs handed to the network so far, by both listeners.
    #[must_use]
    pub fn bytes_sent(&self) -> u64 {
        self.requests().iter().filter(|request| request.is_blob()).map(|one| one.bytes_sent).sum()
    }

    /// How many requests were answered with bytes of blobs, by both listeners.
    #[must_use]
    pub fn blob_requests(&self) -> usize {
        let answered = |request: &&RequestLog| {
            request.is_blob() && request.method == "GET" && matches!(request.status, 200 | 206)
        };
        self.requests().iter().filter(answered).count()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported by its own hook.
            thread.join().ok();
        }
    }
}

/// The registry's thread: serves until `stopped`.
fn run(
    server: &Arc<Server>,
    reserved: [Reservation; 2],
    tls: Option<&TlsAcceptor>,
    ready: &mpsc::Sender<io::Result<()>>,
    stopped: oneshot::Receiver<()>,
) {
    // One thread is enough for some Gbit/s, and it keeps the order of events.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let started = runtime.and_then(|runtime| {
        let listeners = runtime.block_on(async { listen(server, reserved, tls) })?;
        Ok((runtime, listeners))
    });
    let (started, outcome) = match started {
        Ok(started) => (Some(started), Ok(())),
        Err(err) => (None, Err(err)),
    };
    // The starter may be gone, but then `stopped` says so too.
    ready.send(outcome).ok();
    let Some((runtime, mut listeners)) = started else { return };
    runtime.block_on(async {
        // Either the registry is dropped, or it cannot listen any more; clients then see it refused.
        tokio::select! {
            _dropped = stopped => {}
            _failed = listeners.join_next() => {}
        }
        listeners.shutdown().await;
    });
}

/// Listens on both addresses. Must be called inside of the runtime.
fn listen(
    server: &Arc<Server>,
    [registry, cdn]: [Reservation; 2],
    tls: Option<&TlsAcceptor>,
) -> io::Result<JoinSet<io::Result<Infallible>>> {
    let mut listeners = JoinSet::new();
    for (reservation, side) in [(registry, Side::Registry), (cdn, Side::Cdn)] {
        let listener = Listener {
            listener: reservation.listen()?,
            follower: server.faults.follow(reservation.address),
            reservation,
            side,
            tls: tls.cloned(),
            server: Arc::clone(server),
        };
        listeners.spawn(listener.run());
    }
    Ok(listeners)
}

#[cfg(test)]
mod tests;
