//! Listeners and connections: accepting, outages, TLS, and telling what has left the process.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustix::net::sockopt::set_socket_linger;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::body::wait_for_sound;
use super::faults::{Follower, Outage, OutageState};
use super::link;
use super::serve::{Server, Side};

/// An address that is ours even while nobody listens on it.
#[derive(Debug)]
pub(super) struct Reservation {
    /// Bound, never listening. Listeners share its port (`SO_REUSEPORT`), and come and go.
    _holder: TcpSocket,
    pub(super) address: SocketAddr,
}

impl Reservation {
    pub(super) fn new(address: SocketAddr) -> io::Result<Self> {
        if address.port() != 0 {
            // A second registry on the same port would silently share its connections.
            drop(std::net::TcpListener::bind(address)?);
        }
        let holder = socket(address)?;
        let address = holder.local_addr()?;
        Ok(Self { _holder: holder, address })
    }

    pub(super) fn listen(&self) -> io::Result<TcpListener> {
        socket(self.address)?.listen(1024)
    }
}

fn socket(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// One of the registry's two listeners.
pub(super) struct Listener {
    pub(super) reservation: Reservation,
    pub(super) listener: TcpListener,
    pub(super) side: Side,
    pub(super) tls: Option<TlsAcceptor>,
    pub(super) server: Arc<Server>,
    pub(super) follower: Follower,
}

impl Listener {
    /// Accepts and serves until it is dropped; all its connections go with it.
    ///
    /// Errors: the port, though reserved, cannot be listened on again after an outage.
    pub(super) async fn run(self) -> io::Result<Infallible> {
        let Self { reservation, listener, side, tls, server, follower } = self;
        let mut outage = server.faults.watch_outage();
        let mut connections = JoinSet::new();
        let mut listener = Some(listener);
        loop {
            let state = *outage.borrow_and_update();
            match (state.outage, &listener) {
                (Some(Outage::Refuse), _) => listener = None,
                (_, None) => listener = Some(reservation.listen()?),
                (_, Some(_)) => {}
            }
            follower.has_followed(state.changes);
            tokio::select! {
                biased;
                changed = outage.changed() => changed.map_err(io::Error::other)?,
                Some(_ended) = connections.join_next() => {}
                Some(accepted) = accept(listener.as_ref()) => {
                    let Ok(stream) = accepted else {
                        // Of a client that is gone already, or of too many open files, which takes
                        // a while: nothing that the next connection has to pay for.
                        tokio::time::sleep(Duration::from_millis(5)).await;
                        continue;
                    };
                    let server = Arc::clone(&server);
                    let (side, tls) = (side, tls.clone());
                    connections.spawn(async move {
                        // The client sees how its connection ended; there is nobody else to tell.
                        connection(stream, side, tls, server).await.ok();
                    });
                }
            }
        }
    }
}

async fn accept(listener: Option<&TcpListener>) -> Option<io::Result<TcpStream>> {
    Some(listener?.accept().await.map(|(stream, _peer)| stream))
}

async fn connection(
    stream: TcpStream,
    side: Side,
    tls: Option<TlsAcceptor>,
    server: Arc<Server>,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let control = Arc::new(Control::new(&stream)?);
    let outage = server.faults.watch_outage();
    tokio::select! {
        // Once the outage has begun no request is answered, whichever came first.
        biased;
        () = until_reset(outage) => {
            control.reset_on_close();
            Ok(())
        }
        ended = converse(stream, side, tls, server, Arc::clone(&control)) => ended,
    }
}

/// Waits for an outage that ends connections.
async fn until_reset(mut outage: watch::Receiver<OutageState>) {
    let ends = |state: &OutageState| matches!(state.outage, Some(Outage::Refuse | Outage::Reset));
    // An error means that the registry stops, and then the connection is dropped anyway.
    outage.wait_for(ends).await.ok();
}

async fn converse(
    stream: TcpStream,
    side: Side,
    tls: Option<TlsAcceptor>,
    server: Arc<Server>,
    control: Arc<Control>,
) -> io::Result<()> {
    let round_trip = server.pacer.link().latency;
    wait_for_sound(&mut server.faults.watch_outage()).await?;
    link::sleep(round_trip).await?;
    let Some(tls) = tls else { return exchange(stream, side, server, control).await };
    link::sleep(round_trip).await?;
    exchange(tls.accept(stream).await?, side, server, control).await
}

async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    side: Side,
    server: Arc<Server>,
    control: Arc<Control>,
) -> io::Result<()> {
    let io = TokioIo::new(Watched { stream, control: Arc::clone(&control) });
    let service = service_fn(move |request| {
        let (server, control) = (Arc::clone(&server), Arc::clone(&control));
        async move { server.serve(side, control, request).await }
    });
    hyper::server::conn::http1::Builder::new()
        .serve_connection(io, service)
        .await
        .map_err(io::Error::other)
}

/// What a body may do to its connection.
#[derive(Debug)]
pub(super) struct Control {
    /// A second descriptor of the connection: the first belongs to hyper.
    socket: OwnedFd,
    flushes: watch::Sender<u64>,
}

impl Control {
    fn new(stream: &TcpStream) -> io::Result<Self> {
        let socket = stream.as_fd().try_clone_to_owned()?;
        Ok(Self { socket, flushes: watch::Sender::new(0) })
    }

    /// Waits until everything that was handed to hyper is with the kernel. Only for a body, between
    /// its chunks: hyper flushes while a body has nothing to give.
    pub(super) async fn flushed(&self) {
        let mut flushes = self.flushes.subscribe();
        // The sender is ours, it cannot be gone.
        flushes.changed().await.ok();
    }

    /// Makes the end of the connection a reset.
    pub(super) fn reset_on_close(&self) {
        // It fails only if there is no connection any more.
        set_socket_linger(&self.socket, Some(Duration::ZERO)).ok();
    }
}

/// A stream that counts its flushes.
struct Watched<S> {
    stream: S,
    control: Arc<Control>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        if flushed.is_ready() {
            self.control.flushes.send_modify(|flushes| *flushes += 1);
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
