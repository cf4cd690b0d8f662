//! Calls that go through, and what is seen of them. The other side answers as it is told in the headers.

use std::path::Path;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::BodyExt as _;
use hyper::body::Frame;
use parking_lot::Mutex;
use tokio::net::UnixListener;
use tokio::task::JoinSet;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::codegen::http::HeaderValue;
use tonic::transport::Server;

use super::*;

/// Sends back what it gets, as it gets it, and then the trailers that the request's headers name.
#[derive(Clone)]
struct Echo;

impl NamedService for Echo {
    const NAME: &'static str = V1::NAME;
}

impl Service<Request<Body>> for Echo {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Response<Body>, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (parts, body) = request.into_parts();
        let mut trailers = HeaderMap::new();
        for name in ["grpc-status", "grpc-message"] {
            if let Some(value) = parts.headers.get(format!("x-{name}")) {
                trailers.insert(name, value.clone());
            }
        }
        let path = HeaderValue::from_str(parts.uri.path()).unwrap();
        let mut response = Response::new(Body::empty());
        response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
        response.headers_mut().insert("x-path", path);
        if parts.headers.contains_key("x-only-headers") {
            response.headers_mut().extend(trailers);
        } else {
            let with_trailers = body.with_trailers(std::future::ready(Some(Ok(trailers))));
            *response.body_mut() = Body::new(with_trailers);
        }
        Box::pin(std::future::ready(Ok(response)))
    }
}

/// Writes down what it is told.
#[derive(Debug, Default)]
struct Notes(Mutex<Vec<String>>);

impl PullCredentials for Notes {
    fn remember(&self, image: &str, auth: &PullAuth) {
        self.0.lock().push(format!("+{image} {}:{}", auth.username, auth.password));
    }

    fn forget(&self, image: &str, auth: &PullAuth) {
        self.0.lock().push(format!("-{image} {}:{}", auth.username, auth.password));
    }
}

/// A client, the proxy, and the other side, which is not there yet.
struct Line {
    dir: tempfile::TempDir,
    notes: Arc<Notes>,
    client: Channel,
    tasks: JoinSet<()>,
}

impl Line {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let notes = Arc::new(Notes::default());
        let calls = ImageCalls::new(dir.path().join("containerd"), Arc::clone(&notes) as _);
        let images = Images::Containerd(calls);
        let server = Server::builder()
            .add_service(images.service::<V1>())
            .add_service(images.service::<V1Alpha2>());
        let mut tasks = JoinSet::new();
        serve(&mut tasks, &dir.path().join("proxy"), server);
        let connect = Connect(Arc::new(dir.path().join("proxy")));
        let client = Endpoint::from_static("http://localhost").connect_with_connector_lazy(connect);
        Self { dir, notes, client, tasks }
    }

    fn start_echo(&mut self) {
        let server = Server::builder().add_service(Echo);
        serve(&mut self.tasks, &self.dir.path().join("containerd"), server);
    }

    async fn call(
        &self,
        path: &str,
        headers: &[(&'static str, &str)],
        body: Body,
    ) -> Response<Body> {
        let mut request = Request::new(body);
        *request.method_mut() = tonic::codegen::http::Method::POST;
        *request.uri_mut() = path.parse().unwrap();
        for (name, value) in headers {
            request.headers_mut().insert(*name, HeaderValue::from_str(value).unwrap());
        }
        request.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
        let mut channel = self.client.clone();
        std::future::poll_fn(|context| channel.poll_ready(context)).await.unwrap();
        channel.call(request).await.unwrap()
    }

    /// What was told of a pull with this body and these headers, when all of the answer is there.
    async fn told(&self, headers: &[(&'static str, &str)], body: Vec<u8>) -> Vec<String> {
        let path = format!("/{}/PullImage", V1::NAME);
        let response = self.call(&path, headers, full(body.clone())).await;
        let collected = response.into_body().collect().await.unwrap().to_bytes();
        if !headers.iter().any(|(name, _)| *name == "x-only-headers") {
            assert_eq!(collected, body);
        }
        std::mem::take(&mut self.notes.0.lock())
    }
}

fn serve(tasks: &mut JoinSet<()>, path: &Path, server: tonic::transport::server::Router) {
    let listener = UnixListener::bind(path).unwrap();
    tasks.spawn(async move {
        server.serve_with_incoming(UnixListenerStream::new(listener)).await.unwrap();
    });
}

fn full(bytes: Vec<u8>) -> Body {
    Body::new(http_body_util::Full::new(Bytes::from(bytes)))
}

/// A field of a message that is a text or a message.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![(number << 3) | 2];
    let mut len = content.len();
    while len > 0x7f {
        bytes.push(u8::try_from(len & 0x7f).unwrap() | 0x80);
        len >>= 7;
    }
    bytes.push(u8::try_from(len).unwrap());
    [bytes.as_slice(), content].concat()
}

fn framed(message: &[u8]) -> Vec<u8> {
    let len = u32::try_from(message.len()).unwrap();
    [&[0], len.to_be_bytes().as_slice(), message].concat()
}

/// A pull with as much about the Pod.
fn pull(pod: usize) -> Vec<u8> {
    let image = field(1, b"r.io/a");
    let auth = [field(1, b"user"), field(2, b"hunter2")].concat();
    let parts = [field(1, &image), field(3, &vec![0x08; pod]), field(2, &auth)];
    framed(&parts.concat())
}

#[tokio::test]
async fn calls_go_through_whatever_they_are() {
    let mut line = Line::new();
    line.start_echo();
    let path = format!("/{}/NobodyKnowsThis", V1::NAME);
    let headers = [("x-grpc-status", "5"), ("x-grpc-message", "no such thing")];
    let response = line.call(&path, &headers, full(vec![7; 1 << 20])).await;
    assert_eq!(response.headers()["x-path"], path.as_str());
    let collected = response.into_body().collect().await.unwrap();
    let trailers = collected.trailers().unwrap().clone();
    assert_eq!(
        (&trailers["grpc-status"], &trailers["grpc-message"]),
        (&"5".parse().unwrap(), &"no such thing".parse().unwrap())
    );
    assert_eq!(collected.to_bytes(), vec![7; 1 << 20]);
    assert_eq!(line.notes.0.lock().len(), 0);
    // What the other side does not serve it refuses itself.
    let response =
        line.call(&format!("/{}/ListImages", V1Alpha2::NAME), &[], full(Vec::new())).await;
    assert_eq!(response.headers()["grpc-status"], "12");
}

/// Each part arrives before the next is sent.
#[tokio::test]
async fn both_directions_stream() {
    let mut line = Line::new();
    line.start_echo();
    for method in ["StreamImages", "PullImage"] {
        let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Bytes, Infallible>>(1);
        let parts =
            stream::unfold(receiver, async |mut receiver| Some((receiver.recv().await?, receiver)));
        let body = Body::new(StreamBody::new(parts.map(|part| part.map(Frame::data))));
        let path = format!("/{}/{method}", V1::NAME);
        // A pull's first message has to be there for it to be handed on.
        sender.send(Ok(Bytes::from(pull(0)))).await.unwrap();
        let mut answer = line.call(&path, &[], body).await.into_body();
        let first = answer.frame().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(first, pull(0));
        for part in [&b"second"[..], b"third"] {
            sender.send(Ok(Bytes::from_static(part))).await.unwrap();
            assert_eq!(answer.frame().await.unwrap().unwrap().into_data().unwrap(), part);
        }
    }
}

#[tokio::test]
async fn a_pulls_credentials_are_seen_and_nothing_else_of_it() {
    let mut line = Line::new();
    line.start_echo();
    let remembered = ["+r.io/a user:hunter2"];
    assert_eq!(line.told(&[], pull(0)).await, remembered);
    assert_eq!(line.told(&[], pull(300_000)).await, remembered);
    let none: [&str; 0] = [];
    // Too long to be looked at, compressed, nonsense, without credentials, cut off, empty.
    assert_eq!(line.told(&[], pull(2 << 20)).await, none);
    assert_eq!(line.told(&[], [&[1], &pull(0)[1..]].concat()).await, none);
    assert_eq!(line.told(&[], framed(&[0xff; 100])).await, none);
    assert_eq!(line.told(&[], framed(&field(1, &field(1, b"r.io/a")))).await, none);
    assert_eq!(line.told(&[], pull(10)[..15].to_vec()).await, none);
    assert_eq!(line.told(&[], Vec::new()).await, none);
}

#[tokio::test]
async fn what_was_not_authorised_is_forgotten() {
    let mut line = Line::new();
    line.start_echo();
    for (status, message, is_forgotten) in [
        ("0", "", false),
        ("16", "", true),
        ("7", "", true),
        ("2", "failed to resolve: unexpected status from HEAD request: 401 Unauthorized", true),
        ("2", "pull access denied, repository does not exist or may require authorization", true),
        ("5", "r.io/a: not found", false),
        ("14", "connection refused", false),
    ] {
        let mut headers = vec![("x-grpc-status", status), ("x-grpc-message", message)];
        let expected: &[&str] = match is_forgotten {
            true => &["+r.io/a user:hunter2", "-r.io/a user:hunter2"],
            false => &["+r.io/a user:hunter2"],
        };
        assert_eq!(line.told(&headers, pull(0)).await, expected, "{status} {message}");
        headers.push(("x-only-headers", "1"));
        assert_eq!(line.told(&headers, pull(0)).await, expected, "{status} {message}");
    }
}

#[tokio::test]
async fn without_containerd_the_kubelet_hears_what_to_do() {
    let mut line = Line::new();
    for method in ["ListImages", "PullImage"] {
        let path = format!("/{}/{method}", V1::NAME);
        let response = line.call(&path, &[], full(pull(0))).await;
        assert_eq!(response.headers()["grpc-status"], "14");
        let message = response.headers()["grpc-message"].to_str().unwrap();
        let socket = line.dir.path().join("containerd");
        assert!(message.contains(socket.to_str().unwrap()), "{message}");
    }
    // And when it is there, it is asked.
    line.start_echo();
    assert_eq!(line.told(&[], pull(0)).await.len(), 2, "one is of the failed pull");
}

/// The kubelet would go on without its credentials, but not without its images.
#[tokio::test]
async fn a_pull_goes_on_if_taking_note_of_it_fails() {
    #[derive(Debug)]
    struct Broken;
    impl PullCredentials for Broken {
        fn remember(&self, _: &str, _: &PullAuth) {
            panic!("as it is meant to");
        }
        fn forget(&self, _: &str, _: &PullAuth) {}
    }
    let mut line = Line::new();
    line.start_echo();
    let calls = ImageCalls::new(line.dir.path().join("containerd"), Arc::new(Broken));
    let mut request = Request::new(full(pull(0)));
    *request.uri_mut() = format!("http://localhost/{}/PullImage", V1::NAME).parse().unwrap();
    *request.method_mut() = tonic::codegen::http::Method::POST;
    let response = calls.call(request).await;
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), pull(0));
}

#[tokio::test]
async fn a_kubelet_that_asks_where_nobody_is_asked_hears_why_and_is_noticed() {
    let is_asked = Arc::new(AtomicBool::new(false));
    let images = Images::Nobody(Arc::clone(&is_asked));
    let mut service = images.service::<V1Alpha2>();
    assert!(!is_asked.load(Ordering::Relaxed));
    let mut request = Request::new(full(Vec::new()));
    *request.uri_mut() = format!("http://localhost/{}/Any", V1Alpha2::NAME).parse().unwrap();
    let response = service.call(request).await.unwrap();
    let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
    assert_eq!(header("grpc-status"), "12");
    assert!(header("grpc-message").contains("address"), "{}", header("grpc-message"));
    assert!(is_asked.load(Ordering::Relaxed));
}

#[test]
fn credentials_are_not_shown() {
    let auth = PullAuth {
        password: "hunter2".to_owned(),
        auth: "hunter2".to_owned(),
        identity_token: "hunter2".to_owned(),
        ..PullAuth::default()
    };
    assert!(!format!("{auth:?}").contains("hunter2"));
}
