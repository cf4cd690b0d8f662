//! The registry as clients see it, over raw sockets.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::registry::{
    Auth, BearerAuth, Credentials, Fault, Link, Options, Outage, Registry, Scope, Storage, Times,
};
use oci::Digest;

/// An answer, as much of it as came.
#[derive(Debug)]
struct Response {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Response {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }
}

fn send(stream: &mut impl Write, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str(&format!("Content-Length: {}\r\n\r\n", body.len()));
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
}

/// Reads until the connection ends, well or badly.
fn receive(stream: &mut impl Read) -> (Response, io::Result<()>) {
    let mut bytes = Vec::new();
    let end = stream.read_to_end(&mut bytes).map(|_| ());
    let split = bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4);
    let Some(split) = split else {
        return (Response { status: 0, headers: Vec::new(), body: bytes }, end);
    };
    let head = String::from_utf8(bytes[..split].to_vec()).unwrap();
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    (Response { status, headers, body: bytes[split..].to_vec() }, end)
}

fn connect(registry: &Registry) -> TcpStream {
    let stream = TcpStream::connect(registry.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

fn request(
    registry: &Registry,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Response {
    let mut stream = connect(registry);
    send(&mut stream, method, path, headers, body);
    let (response, end) = receive(&mut stream);
    end.unwrap();
    response
}

fn get(registry: &Registry, path: &str, headers: &[(&str, &str)]) -> Response {
    request(registry, "GET", path, headers, b"")
}

fn start() -> Registry {
    Registry::start(Options::default()).unwrap()
}

fn blob_path(digest: Digest) -> String {
    format!("/v2/some/thing/blobs/{digest}")
}

/// 300 KB that are different everywhere.
fn some_bytes() -> Vec<u8> {
    (0..75_000_u32).flat_map(u32::to_le_bytes).collect()
}

#[test]
fn blobs_and_their_ranges() {
    let registry = start();
    let bytes = some_bytes();
    let digest = registry.put_blob(bytes.clone());
    let path = blob_path(digest);

    let whole = get(&registry, &path, &[]);
    assert_eq!((whole.status, &whole.body), (200, &bytes));
    assert_eq!(whole.header("docker-content-digest"), Some(digest.to_string().as_str()));

    let part = get(&registry, &path, &[("Range", "bytes=1000-199999")]);
    assert_eq!((part.status, &part.body[..]), (206, &bytes[1000..200_000]));
    assert_eq!(part.header("content-range"), Some("bytes 1000-199999/300000"));
    assert_eq!(part.header("content-length"), Some("199000"));

    let beyond = get(&registry, &path, &[("Range", "bytes=300000-")]);
    assert_eq!((beyond.status, beyond.header("content-range")), (416, Some("bytes */300000")));

    let head = request(&registry, "HEAD", &path, &[], b"");
    assert_eq!((head.status, head.header("content-length")), (200, Some("300000")));
    assert!(head.body.is_empty());

    assert_eq!(get(&registry, &blob_path(Digest::of(b"other")), &[]).status, 404);
    assert_eq!(get(&registry, "/v2/some/thing/blobs/sha256:zz", &[]).status, 404);

    let log = registry.requests();
    assert_eq!(log.len(), 6);
    assert_eq!(log[1].range, Some((1000, 199_999)));
    assert_eq!(log[2].range, Some((300_000, u64::MAX)));
    assert_eq!((log[1].status, log[1].bytes_sent), (206, 199_000));
    assert_eq!(registry.blob_requests(), 2);
    assert!(registry.bytes_sent() >= 499_000);
    registry.clear_requests();
    assert_eq!(registry.bytes_sent(), 0);
}

#[test]
fn a_file_is_served_like_bytes() {
    let registry = start();
    let bytes = some_bytes();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    let digest = registry.put_blob_file(file.path()).unwrap();
    drop(file);
    assert_eq!(digest, Digest::of(&bytes));
    assert_eq!(get(&registry, &blob_path(digest), &[]).body, bytes);
    let part = get(&registry, &blob_path(digest), &[("Range", "bytes=-10")]);
    assert_eq!(part.body, bytes[bytes.len() - 10..]);
}

#[test]
fn pushing_to_memory_and_to_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    for storage in [Storage::Memory, Storage::Folder(folder.path().join("blobs"))] {
        let registry = Registry::start(Options { storage, ..Options::default() }).unwrap();
        check_push(&registry);
    }
}

fn check_push(registry: &Registry) {
    let (config, layer) = (b"{}".as_slice(), some_bytes());
    let begun = request(registry, "POST", "/v2/a/b/blobs/uploads/", &[], b"");
    assert_eq!(begun.status, 202);
    let location = begun.header("location").unwrap().to_owned();
    let (first, second) = layer.split_at(100_000);
    assert_eq!(request(registry, "PATCH", &location, &[], first).status, 202);
    let early = request(registry, "PATCH", &location, &[("Content-Range", "5-9")], b"12345");
    assert_eq!(early.status, 416);
    assert_eq!(get(registry, &location, &[]).header("range"), Some("0-99999"));
    let digest = Digest::of(&layer);
    let done = request(registry, "PUT", &format!("{location}?digest={digest}"), &[], second);
    assert_eq!(done.status, 201);
    assert_eq!(get(registry, &blob_path(digest), &[]).body, layer);

    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "config": { "mediaType": "x/config", "digest": Digest::of(config).to_string(), "size": 2 },
        "layers": [{ "mediaType": "x/layer", "digest": digest.to_string(), "size": layer.len() }],
    })
    .to_string();
    let media_type = [("Content-Type", "application/vnd.oci.image.manifest.v1+json")];
    let put = |path: &str| request(registry, "PUT", path, &media_type, manifest.as_bytes());
    assert_eq!(put("/v2/a/b/manifests/tag").status, 404, "its config is not here yet");
    let config_path = format!("/v2/a/b/blobs/uploads/?digest={}", Digest::of(config));
    assert_eq!(request(registry, "POST", &config_path, &[], b"xx").status, 400);
    assert_eq!(request(registry, "POST", &config_path, &[], config).status, 201);
    assert_eq!(put(&format!("/v2/a/b/manifests/{digest}")).status, 400, "another digest");
    assert_eq!(put("/v2/a/b/manifests/tag").status, 201);

    let digest = Digest::of(manifest.as_bytes());
    for reference in ["tag".to_owned(), digest.to_string()] {
        let found = get(registry, &format!("/v2/a/b/manifests/{reference}"), &[]);
        assert_eq!((found.status, &found.body[..]), (200, manifest.as_bytes()));
        assert_eq!(found.header("content-type"), Some(media_type[0].1));
    }
    assert_eq!(get(registry, "/v2/a/b/tags/list", &[]).body, br#"{"name":"a/b","tags":["tag"]}"#);
    let path = format!("/v2/a/b/manifests/{digest}");
    assert_eq!(request(registry, "DELETE", &path, &[], b"").status, 202);
    assert_eq!(get(registry, "/v2/a/b/manifests/tag", &[]).status, 404);
}

#[test]
fn referrers_are_found_or_not_supported() {
    let registry = start();
    let subject = registry.put_manifest("a", Some("tag"), "application/x", "{}");
    let artifact = serde_json::json!({
        "artifactType": "application/soci",
        "annotations": { "k": "v" },
        "subject": { "digest": subject.to_string() },
    });
    let artifact = registry.put_manifest("a", None, "application/m", artifact.to_string());
    let path = format!("/v2/a/referrers/{subject}");
    let listed = |query: &str| -> serde_json::Value {
        serde_json::from_slice(&get(&registry, &format!("{path}{query}"), &[]).body).unwrap()
    };
    let found = &listed("")["manifests"][0];
    assert_eq!(found["digest"], artifact.to_string());
    assert_eq!(found["artifactType"], "application/soci");
    assert_eq!(found["annotations"]["k"], "v");
    assert_eq!(listed("?artifactType=other")["manifests"], serde_json::json!([]));
    assert_eq!(listed("?artifactType=application%2Fsoci")["manifests"][0], *found);
    registry.faults().referrers(false);
    assert_eq!(get(&registry, &path, &[]).status, 404);
}

#[test]
fn basic_and_bearer_authentication() {
    let registry = start();
    let path = blob_path(registry.put_blob("x"));
    let credentials = Credentials::new("me", "secret");
    let basic = ("Authorization", "Basic bWU6c2VjcmV0");
    registry.faults().set_auth(Auth::Basic(credentials.clone()));
    assert_eq!(get(&registry, &path, &[]).status, 401);
    assert_eq!(get(&registry, &path, &[basic]).status, 200);
    assert!(registry.requests()[1].authorization);

    let bearer = BearerAuth { credentials: Some(credentials), uses: Some(2), lifetime: None };
    registry.faults().set_auth(Auth::Bearer(bearer));
    let challenge = get(&registry, &path, &[]);
    let address = registry.address();
    assert_eq!(
        challenge.header("www-authenticate").unwrap(),
        format!(
            "Bearer realm=\"http://{address}/token\",service=\"testkit\",\
             scope=\"repository:some/thing:pull\""
        )
    );
    let token_path = "/token?service=testkit&scope=repository:some/thing:pull";
    assert_eq!(get(&registry, token_path, &[]).status, 401);
    let token = || {
        let answer = get(&registry, token_path, &[basic]);
        let document: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        format!("Bearer {}", document["token"].as_str().unwrap())
    };
    let first = token();
    let with = |token: &str| get(&registry, &path, &[("Authorization", token)]).status;
    assert_eq!([with(&first), with(&first), with(&first)], [200, 200, 401], "two uses");
    let second = token();
    registry.faults().expire_tokens();
    assert_eq!(with(&second), 401);
    let third = [("Authorization", token())];
    let third = [("Authorization", third[0].1.as_str())];
    assert_eq!(get(&registry, "/v2/other/manifests/x", &third).status, 401, "another repository");
    assert_eq!(
        request(&registry, "POST", "/v2/some/thing/blobs/uploads/", &third, b"").status,
        401
    );
}

#[test]
fn statuses_instead_of_answers() {
    let registry = start();
    let (path, other) = (blob_path(registry.put_blob("x")), blob_path(registry.put_blob("y")));
    let status = |path: &str| get(&registry, path, &[]).status;
    let faults = registry.faults();

    faults.too_many_requests(Scope::Blobs, 1, Duration::from_millis(1200));
    assert_eq!(get(&registry, "/v2/", &[]).status, 200);
    let refused = get(&registry, &path, &[]);
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("2")));
    assert_eq!(status(&path), 200);

    let pattern = Times::Pattern(vec![true, false, false]);
    let id = faults.inject(Scope::Everything, pattern, Fault::Status(503));
    let seen: Vec<u16> = (0..6).map(|_| status(&path)).collect();
    assert_eq!(seen, [503, 200, 200, 503, 200, 200]);
    faults.remove(id);
    assert_eq!(status(&path), 200);

    let hidden = faults.hide_blob(Digest::of(b"x"));
    assert_eq!([status(&path), status(&other)], [404, 200]);
    faults.remove(hidden);
    faults.fail_next(Scope::Manifests, 1, 500);
    assert_eq!(status(&path), 200);
    faults.clear();
    assert_eq!(status("/v2/a/manifests/b"), 404);
}

#[test]
fn bodies_are_cut_reset_and_spoilt() {
    let registry = start();
    let bytes = some_bytes();
    let digest = registry.put_blob(bytes.clone());
    let path = blob_path(digest);
    let faults = registry.faults();
    let attempt = |headers: &[(&str, &str)]| {
        let mut stream = connect(&registry);
        send(&mut stream, "GET", &path, headers, b"");
        receive(&mut stream)
    };

    for after in [0, 1, 70_000] {
        faults.inject(Scope::Blobs, Times::Next(1), Fault::Truncate { after });
        let (cut, end) = attempt(&[]);
        end.unwrap();
        assert_eq!(cut.header("content-length"), Some("300000"));
        assert_eq!(cut.body, bytes[..usize::try_from(after).unwrap()]);
    }
    assert_eq!(attempt(&[]).0.body, bytes);

    faults.inject(Scope::Blobs, Times::Next(1), Fault::ResetBody { after: 100_000 });
    assert_eq!(attempt(&[]).1.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    faults.inject(Scope::Blobs, Times::Next(1), Fault::ResetRequest);
    assert_eq!(attempt(&[]).1.unwrap_err().kind(), io::ErrorKind::ConnectionReset);

    faults.flip_byte(digest, 100_001, Times::Next(1));
    assert_eq!(attempt(&[("Range", "bytes=0-99")]).0.body, bytes[..100]);
    let mut spoilt = bytes[100_000..200_000].to_vec();
    spoilt[1] = !spoilt[1];
    let range = [("Range", "bytes=100000-199999")];
    assert_eq!(attempt(&range).0.body, spoilt);
    assert_eq!(attempt(&range).0.body, bytes[100_000..200_000]);

    faults.inject(Scope::Blob(digest), Times::Always, Fault::FlipBodyByte { offset: u64::MAX });
    let last = attempt(&[]).0.body.pop().unwrap();
    assert_eq!(last, !bytes[bytes.len() - 1]);
    faults.clear();

    faults.inject(Scope::Blobs, Times::Next(1), Fault::IgnoreRange);
    assert_eq!(attempt(&range).0.status, 200);
    assert_eq!(attempt(&range).0.status, 206);
    faults.ignore_ranges(true);
    assert_eq!(attempt(&range).0.body, bytes);
    faults.ignore_ranges(false);
    assert_eq!(attempt(&range).0.status, 206);
}

#[test]
fn a_stalled_body_goes_on_when_released() {
    let registry = start();
    let bytes = some_bytes();
    let path = blob_path(registry.put_blob(bytes.clone()));
    registry.faults().inject(Scope::Blobs, Times::Next(1), Fault::Stall { after: 150_000 });
    let mut stream = connect(&registry);
    send(&mut stream, "GET", &path, &[], b"");
    let mut received = Vec::new();
    let mut buffer = [0; 4096];
    while !received.ends_with(&bytes[149_000..150_000]) {
        let n = stream.read(&mut buffer).unwrap();
        received.extend_from_slice(&buffer[..n]);
    }
    stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert_eq!(stream.read(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    assert_eq!(get(&registry, &path, &[]).body, bytes, "others are served");
    registry.faults().release_stalled();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.read_to_end(&mut received).unwrap();
    assert!(received.ends_with(&bytes));
}

#[test]
fn redirected_blobs_come_without_authorization() {
    let registry = start();
    let digest = registry.put_blob(some_bytes());
    registry.faults().redirect_blobs(true);
    let redirected = get(&registry, &blob_path(digest), &[]);
    assert_eq!(redirected.status, 307);
    let location = redirected.header("location").unwrap().to_owned();
    let prefix = format!("http://{}", registry.cdn_address());
    let path = location.strip_prefix(&prefix).unwrap();

    let mut stream = TcpStream::connect(registry.cdn_address()).unwrap();
    registry.faults().flip_byte(digest, 0, Times::Next(1));
    send(&mut stream, "GET", path, &[("Range", "bytes=0-3")], b"");
    assert_eq!(receive(&mut stream).0.body, [0xff, 0, 0, 0]);
    let log = registry.requests();
    assert_eq!((log[1].path.as_str(), log[1].status), (format!("/cdn/{digest}").as_str(), 206));
    assert!(!log[1].authorization);
    assert_eq!((registry.blob_requests(), registry.bytes_sent()), (1, 4));
    assert_eq!(get(&registry, &blob_path(Digest::of(b"none")), &[]).status, 404);
}

#[test]
fn outages_begin_and_end_at_once() {
    let registry = start();
    let bytes = some_bytes();
    let path = blob_path(registry.put_blob(bytes.clone()));
    for outage in [Outage::Refuse, Outage::Reset] {
        let mut idle = connect(&registry);
        registry.faults().cut(outage);
        let mut buffer = [0; 16];
        let seen = idle.read(&mut buffer);
        assert_eq!(seen.unwrap_err().kind(), io::ErrorKind::ConnectionReset, "{outage:?}");
        let again = TcpStream::connect(registry.address());
        let again = again.and_then(|mut stream| stream.read(&mut buffer)).unwrap_err();
        let expected = match outage {
            Outage::Refuse => io::ErrorKind::ConnectionRefused,
            _ => io::ErrorKind::ConnectionReset,
        };
        assert_eq!(again.kind(), expected);
        registry.faults().restore();
        assert_eq!(get(&registry, &path, &[]).body, bytes);
    }
    registry.faults().cut(Outage::Silence);
    let mut waiting = connect(&registry);
    send(&mut waiting, "GET", &path, &[], b"");
    waiting.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert_eq!(waiting.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    registry.faults().restore();
    waiting.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(receive(&mut waiting).0.body, bytes);
}

#[test]
fn it_speaks_tls_by_its_own_authority() {
    let options = Options { tls: true, ..Options::default() };
    let registry = Registry::start(options).unwrap();
    let digest = registry.put_blob("secret");
    let mut roots = rustls::RootCertStore::empty();
    let pem = registry.ca_pem().unwrap();
    let der = rustls_pem(pem);
    roots.add(der).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
    let session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut stream = rustls::StreamOwned::new(session, connect(&registry));
    send(&mut stream, "GET", &blob_path(digest), &[], b"");
    assert_eq!(receive(&mut stream).0.body, b"secret");
}

fn rustls_pem(pem: &str) -> rustls::pki_types::CertificateDer<'static> {
    use rustls::pki_types::pem::PemObject as _;
    rustls::pki_types::CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
}

#[test]
fn stopping_ends_its_connections_and_frees_the_port() {
    let registry = start();
    let address = registry.address();
    let mut idle = connect(&registry);
    drop(registry);
    assert_eq!(idle.read(&mut [0]).unwrap_or(0), 0);
    assert_eq!(TcpStream::connect(address).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
}

/// How long it takes to get a blob of `len` bytes over `connections` at once.
fn time_transfers(link: Link, len: usize, connections: usize) -> Vec<Duration> {
    let registry = Registry::start(Options { link, ..Options::default() }).unwrap();
    let path = blob_path(registry.put_blob(vec![7; len]));
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let transfer = || {
            assert_eq!(get(&registry, &path, &[]).body.len(), len);
            begin.elapsed()
        };
        let threads: Vec<_> = (0..connections).map(|_| scope.spawn(transfer)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Checks that the slowest of the transfers takes about `seconds`. It may never be faster; as the
/// machine may be busy, it must be about as fast in one of some attempts. Returns all times of that one.
#[track_caller]
fn check_time(link: Link, len: usize, connections: usize, seconds: f64) -> Vec<Duration> {
    let mut seen = Vec::new();
    for _attempt in 0..8 {
        let times = time_transfers(link, len, connections);
        let slowest = times.iter().max().unwrap().as_secs_f64();
        assert!(slowest > seconds * 0.98, "{times:?} instead of {seconds} s");
        if slowest < seconds * 1.2 {
            return times;
        }
        seen.push(slowest);
    }
    panic!("{seen:?} instead of {seconds} s");
}

#[test]
fn the_link_paces_what_all_connections_send() {
    // 8 MB at 100 Mbit/s.
    let times = check_time(Link::mbit_per_s(100, Duration::ZERO), 2_000_000, 4, 0.64);
    // Fair: all of them end together.
    let (first, last) = (times.iter().min().unwrap(), times.iter().max().unwrap());
    assert!(*first > *last * 8 / 10, "{times:?}");
}

#[test]
fn the_link_keeps_up_a_gigabit_per_second() {
    check_time(Link::mbit_per_s(1000, Duration::ZERO), 31_250_000, 2, 0.5);
}

#[test]
fn the_first_answer_of_a_connection_takes_two_round_trips() {
    check_time(
        Link { bandwidth_bits_per_s: None, latency: Duration::from_millis(150) },
        10,
        1,
        0.3,
    );
}
