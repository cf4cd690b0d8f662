//! The kubelet's calls about images: handed on to containerd as they are, but for a look at what images are
//! pulled with.
//!
//! Requests and answers are passed on as HTTP/2 streams, whatever the method, so that methods of later
//! versions, those that stream among them, need no change here.

use std::convert::Infallible;
use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt as _;
use http_body_util::{BodyStream, StreamBody};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, Request, Response, Uri};
use tonic::codegen::{BoxFuture, Service};
use tonic::server::NamedService;
use tonic::transport::{Channel, Endpoint};

use self::message::FirstMessage;

mod message;

pub use self::message::PullAuth;

/// Is told what images are pulled with. Calls may block; the pull goes on without them if they take long.
pub trait PullCredentials: Send + Sync + fmt::Debug {
    /// Before containerd hears of the pull of `image`, a reference as the kubelet has it.
    fn remember(&self, image: &str, auth: &PullAuth);

    /// When the registry did not accept it.
    fn forget(&self, image: &str, auth: &PullAuth);
}

/// How the kubelet's calls about images are served.
#[derive(Debug, Clone)]
pub struct ImageCalls {
    containerd: Arc<PathBuf>,
    channel: Channel,
    credentials: Arc<dyn PullCredentials>,
}

/// Who is asked about images by the kubelet.
#[derive(Debug, Clone)]
pub enum Images {
    /// containerd.
    Containerd(ImageCalls),
    /// Nobody, since nobody has said where containerd is; whether anybody has asked.
    Nobody(Arc<AtomicBool>),
}

/// One version of the kubelet's interface.
pub(crate) trait Version: Send + Sync + 'static {
    /// The service as a path has it.
    const NAME: &'static str;
}

/// Of Kubernetes 1.23 and later.
#[derive(Debug)]
pub(crate) enum V1 {}

/// Of Kubernetes until 1.25.
#[derive(Debug)]
pub(crate) enum V1Alpha2 {}

impl Version for V1 {
    const NAME: &'static str = "runtime.v1.ImageService";
}

impl Version for V1Alpha2 {
    const NAME: &'static str = "runtime.v1alpha2.ImageService";
}

/// The service of one version.
#[derive(Debug)]
pub(crate) struct ImageService<V> {
    images: Images,
    version: PhantomData<V>,
}

impl Images {
    pub(crate) fn service<V: Version>(&self) -> ImageService<V> {
        ImageService { images: self.clone(), version: PhantomData }
    }

    async fn call(self, request: Request<Body>) -> Response<Body> {
        let is_asked = match self {
            Self::Containerd(calls) => return calls.call(request).await,
            Self::Nobody(is_asked) => is_asked,
        };
        let path = request.uri().path();
        if !is_asked.swap(true, Ordering::Relaxed) {
            tracing::error!(path, "the kubelet asks for images here: {NOWHERE}");
        }
        Status::unimplemented(format!("Hermes does not serve {path}: {NOWHERE}")).into_http()
    }
}

impl ImageCalls {
    /// Hands calls on to containerd's own socket. Nothing is connected before there is a call, and a broken
    /// connection is made again. Must be called within a runtime.
    #[must_use]
    pub fn new(containerd: PathBuf, credentials: Arc<dyn PullCredentials>) -> Self {
        let containerd = Arc::new(containerd);
        let connect = Connect(Arc::clone(&containerd));
        // Nobody looks the name up.
        let endpoint = Endpoint::from_static("http://localhost")
            .connect_timeout(CONNECT_PATIENCE)
            .http2_max_header_list_size(MOST_HEADERS);
        let channel = endpoint.connect_with_connector_lazy(connect);
        Self { containerd, channel, credentials }
    }

    async fn call(self, request: Request<Body>) -> Response<Body> {
        if !request.uri().path().ends_with(PULL) {
            return self.forward(request).await;
        }
        let (parts, body) = request.into_parts();
        let (first, body) = FirstMessage::read(body).await;
        let request = Request::from_parts(parts, body);
        let Some((image, auth)) = first.pull() else { return self.forward(request).await };
        let pull = Arc::new(Pull { image, auth });
        self.tell(&pull, |credentials, Pull { image, auth }| credentials.remember(image, auth))
            .await;
        let response = self.forward(request).await;
        // Without a body the status is a header.
        if is_unauthorized(response.headers()) {
            self.refused(&pull).await;
        }
        let (parts, body) = response.into_parts();
        let watched = BodyStream::new(body).then(move |frame| {
            let (calls, pull) = (self.clone(), Arc::clone(&pull));
            async move {
                let trailers = frame.as_ref().ok().and_then(|frame| frame.trailers_ref());
                if trailers.is_some_and(is_unauthorized) {
                    calls.refused(&pull).await;
                }
                frame
            }
        });
        Response::from_parts(parts, Body::new(StreamBody::new(watched)))
    }

    async fn refused(&self, pull: &Arc<Pull>) {
        tracing::debug!(image = pull.image, "a pull was not authorised");
        self.tell(pull, |credentials, Pull { image, auth }| credentials.forget(image, auth)).await;
    }

    /// Calls what may block. A pull does not fail for it.
    async fn tell(
        &self,
        pull: &Arc<Pull>,
        what: impl FnOnce(&dyn PullCredentials, &Pull) + Send + 'static,
    ) {
        let (credentials, pull) = (Arc::clone(&self.credentials), Arc::clone(pull));
        let told = tokio::task::spawn_blocking(move || what(&*credentials, &pull));
        match tokio::time::timeout(TELL_PATIENCE, told).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(%error, "a pull's credentials were not taken note of");
            }
            Err(_late) => tracing::warn!("it takes long to take note of a pull's credentials"),
        }
    }

    async fn forward(&self, request: Request<Body>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path().to_owned();
        let mut forwarded = Request::new(body);
        *forwarded.method_mut() = parts.method;
        *forwarded.uri_mut() = parts.uri;
        *forwarded.headers_mut() = parts.headers;
        let mut channel = self.channel.clone();
        let ready = std::future::poll_fn(|context| channel.poll_ready(context)).await;
        let answered = match ready {
            Ok(()) => channel.call(forwarded).await,
            Err(error) => Err(error),
        };
        match answered {
            Ok(response) => response,
            Err(error) => {
                let socket = self.containerd.display();
                let cause = causes::in_full(&error);
                tracing::warn!(%socket, path, error = cause, "containerd was not asked");
                let text = format!(
                    "containerd at {socket} cannot be asked; start it, or name its socket as \
                     `address` of [containerd] in the configuration of Hermes: {cause}"
                );
                Status::unavailable(text).into_http()
            }
        }
    }
}

/// What was looked at.
#[derive(Debug)]
struct Pull {
    image: String,
    auth: PullAuth,
}

/// Whether the end of a call says that the registry wants other credentials, or better ones. containerd has
/// no status of its own for it in most versions, but the registry's answer in its text.
fn is_unauthorized(trailers: &HeaderMap) -> bool {
    let text = |name: &str| {
        let value = trailers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()));
        value.unwrap_or_default().to_ascii_lowercase()
    };
    match text("grpc-status").as_str() {
        "" | "0" => false,
        "7" | "16" => true,
        _ => {
            let message = text("grpc-message");
            UNAUTHORIZED.iter().any(|part| message.contains(part))
        }
    }
}

impl<V> Clone for ImageService<V> {
    fn clone(&self) -> Self {
        Self { images: self.images.clone(), version: PhantomData }
    }
}

impl<V: Version> NamedService for ImageService<V> {
    const NAME: &'static str = V::NAME;
}

impl<V: Version> Service<Request<Body>> for ImageService<V> {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Response<Body>, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let images = self.images.clone();
        Box::pin(async move { Ok(images.call(request).await) })
    }
}

/// Connects to a unix socket, whatever it is asked for.
struct Connect(Arc<PathBuf>);

impl Service<Uri> for Connect {
    type Response = TokioIo<UnixStream>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = std::io::Result<TokioIo<UnixStream>>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let path = Arc::clone(&self.0);
        Box::pin(async move { Ok(TokioIo::new(UnixStream::connect(&*path).await?)) })
    }
}

/// What keeps calls from being handed on.
const NOWHERE: &str = "it does not know where containerd is; name containerd's socket as `address` of [containerd] in the \
                       configuration of Hermes, and restart it";

/// The end of the path of the only method that is looked at.
const PULL: &str = "/PullImage";

/// What containerd's texts have in common in such a case; from 1.6 to 2.4.
const UNAUTHORIZED: &[&str] = &[
    "401 unauthorized",
    "403 forbidden",
    "authorization failed",
    "insufficient_scope",
    "pull access denied",
];

const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
const TELL_PATIENCE: Duration = Duration::from_secs(2);
/// containerd's errors may be long, and they are trailers.
const MOST_HEADERS: u32 = 1 << 20;

#[cfg(test)]
mod tests;
