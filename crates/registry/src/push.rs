//! Storing blobs and manifests in a registry.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::stream;
use oci::media_type::OCTET_STREAM;
use oci::{Descriptor, Digest, ManifestOrIndex, parse_manifest};
use parking_lot::Mutex;
use reqwest::header::{CONTENT_TYPE, HeaderName, LOCATION};
use reqwest::{Method, StatusCode, Url};
use tokio::io::AsyncReadExt as _;

use crate::client::ClientOptions;
use crate::error::public;
use crate::referrers::referrer_entry;
use crate::repository::manifest_call;
use crate::transport::{Answer, Call, Exchange};
use crate::{Capability, FetchError, Repository};

/// The bytes of a blob that is pushed. They may be read several times, for retries.
#[derive(Debug, Clone)]
pub enum BlobBody {
    /// In memory.
    Bytes(Bytes),
    /// The first `size` bytes of a file, which is streamed.
    File {
        /// The file.
        path: PathBuf,
        /// How many bytes of it.
        size: u64,
    },
}

impl From<Bytes> for BlobBody {
    fn from(bytes: Bytes) -> Self {
        Self::Bytes(bytes)
    }
}

impl From<Vec<u8>> for BlobBody {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes.into())
    }
}

impl Repository {
    /// Stores a blob, unless the repository has it already.
    ///
    /// # Errors
    /// `Refused` if the bytes are not those of the digest, or the registry takes none.
    pub async fn push_blob(
        &self,
        digest: &Digest,
        body: impl Into<BlobBody>,
    ) -> Result<(), FetchError> {
        let body = &body.into();
        self.retry(Capability::Push, |server| async move {
            self.exchange(&server).push_blob(digest, body).await
        })
        .await
    }

    /// Stores a manifest under a tag or its digest, and describes it.
    ///
    /// What it refers to must be stored before. If it has a subject and the registry has no
    /// referrers API, it is also added to the tag that lists the subject's referrers.
    ///
    /// # Errors
    /// `WrongDigest` if the digest is that of other bytes.
    pub async fn push_manifest(
        &self,
        tag_or_digest: &str,
        media_type: &str,
        bytes: impl Into<Bytes>,
    ) -> Result<Descriptor, FetchError> {
        let bytes: &Bytes = &bytes.into();
        let subject = subject_of(media_type, bytes);
        let subject = &subject;
        self.retry(Capability::Push, |server| async move {
            let exchange = self.exchange(&server);
            let stored = exchange.put_manifest(tag_or_digest, media_type, bytes.clone()).await?;
            if let Some((subject, entry)) = subject
                && !stored.knows_subject
            {
                self.add_to_fallback_tag(&server, subject, entry).await?;
            }
            Ok(stored.descriptor)
        })
        .await
    }
}

/// A manifest's subject, and how its list of referrers describes the manifest.
fn subject_of(media_type: &str, bytes: &[u8]) -> Option<(Digest, Descriptor)> {
    match parse_manifest(Some(media_type), bytes).ok()? {
        ManifestOrIndex::Manifest(manifest) => {
            let entry = referrer_entry(media_type, bytes, &manifest);
            Some((manifest.subject?.digest, entry))
        }
        ManifestOrIndex::Index(index) => {
            let Descriptor { .. } = index.subject.as_ref()?;
            let (artifact_type, annotations) = (index.artifact_type, index.annotations);
            let entry =
                Descriptor { artifact_type, annotations, ..Descriptor::of(media_type, bytes) };
            Some((index.subject?.digest, entry))
        }
    }
}

/// A manifest that has been stored.
pub(crate) struct Stored {
    descriptor: Descriptor,
    /// Whether the registry lists it among the referrers of its subject by itself.
    knows_subject: bool,
}

impl Exchange<'_> {
    async fn push_blob(&self, digest: &Digest, body: &BlobBody) -> Result<(), FetchError> {
        let blob = self.url(&format!("blobs/{digest}"));
        let answer = self.call(&Call::new(Method::HEAD, blob).pushing(None)).await?;
        match answer.response.status() {
            StatusCode::OK => return Ok(()),
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => {}
            _ => return Err(self.refusal(answer).await),
        }
        let start = Call::new(Method::POST, self.url("blobs/uploads/")).pushing(None);
        let answer = self.call(&start).await?;
        if answer.response.status() != StatusCode::ACCEPTED {
            return Err(self.refusal(answer).await);
        }
        let mut upload = self.upload_location(&answer)?;
        upload.query_pairs_mut().append_pair("digest", &digest.to_string());
        let put =
            Call::new(Method::PUT, upload).header(CONTENT_TYPE, OCTET_STREAM).pushing(Some(body));
        let answer = self.call(&put).await?;
        match answer.response.status() {
            StatusCode::CREATED | StatusCode::NO_CONTENT | StatusCode::OK => Ok(()),
            _ => Err(self.refusal(answer).await),
        }
    }

    /// Where an upload goes on.
    fn upload_location(&self, answer: &Answer) -> Result<Url, FetchError> {
        let malformed = |what| FetchError::Malformed { url: public(&answer.url), what };
        let location = answer.response.headers().get(LOCATION);
        let location = location
            .and_then(|location| location.to_str().ok())
            .and_then(|location| answer.url.join(location).ok())
            .ok_or_else(|| malformed("an upload without a place to go to"))?;
        // Registries behind a proxy that ends TLS often do not know that they have it.
        let base = &self.server.host.base;
        let same_host = location.host() == base.host();
        if location.scheme() == "http" && base.scheme() == "https" {
            let mut secured = location;
            let done = same_host
                && secured.set_scheme("https").is_ok()
                && secured.set_port(base.port()).is_ok();
            return if done { Ok(secured) } else { Err(malformed("an upload without TLS")) };
        }
        Ok(location)
    }

    pub(crate) async fn put_manifest(
        &self,
        target: &str,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<Stored, FetchError> {
        let descriptor = Descriptor::of(media_type, &bytes);
        let url = self.url(&format!("manifests/{target}"));
        if let Some(expected) = target.parse().ok().filter(|asked| *asked != descriptor.digest) {
            let (url, found) = (public(&url), descriptor.digest);
            return Err(FetchError::WrongDigest { url, expected, found });
        }
        let body = BlobBody::Bytes(bytes);
        let put =
            manifest_call(Method::PUT, url).header(CONTENT_TYPE, media_type).pushing(Some(&body));
        let answer = self.call(&put).await?;
        match answer.response.status() {
            StatusCode::CREATED | StatusCode::OK | StatusCode::ACCEPTED => {
                let knows_subject = answer.response.headers().contains_key(OCI_SUBJECT);
                Ok(Stored { descriptor, knows_subject })
            }
            _ => Err(self.refusal(answer).await),
        }
    }
}

impl BlobBody {
    /// How many bytes there are.
    #[must_use]
    pub fn size(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => u64::try_from(bytes.len()).unwrap_or(u64::MAX),
            Self::File { size, .. } => *size,
        }
    }

    /// Starts to read from the beginning.
    pub(crate) async fn open(&self, progress: &Progress) -> Result<reqwest::Body, FetchError> {
        let progress = progress.clone();
        progress.expect(self.size());
        Ok(match self {
            Self::Bytes(bytes) => {
                let pieces = stream::unfold(bytes.clone(), move |mut rest| {
                    let piece = rest.split_to(rest.len().min(PIECE));
                    progress.moved(piece.len());
                    let next = (!piece.is_empty()).then_some((Ok::<_, io::Error>(piece), rest));
                    std::future::ready(next)
                });
                reqwest::Body::wrap_stream(pieces)
            }
            Self::File { path, size } => {
                let file = tokio::fs::File::open(path).await.map_err(FetchError::File)?;
                let pieces = stream::unfold(
                    (file, *size, progress),
                    |(mut file, left, progress)| async move {
                        if left == 0 {
                            return None;
                        }
                        let piece = match read_piece(&mut file, left).await {
                            Ok(piece) => piece,
                            Err(error) => {
                                let shown = io::Error::from(error.kind());
                                progress.failed(error);
                                return Some((Err(shown), (file, 0, progress)));
                            }
                        };
                        progress.moved(piece.len());
                        let left = left.saturating_sub(u64::try_from(piece.len()).unwrap_or(left));
                        Some((Ok(piece), (file, left, progress)))
                    },
                );
                reqwest::Body::wrap_stream(pieces)
            }
        })
    }
}

async fn read_piece(file: &mut tokio::fs::File, left: u64) -> io::Result<Bytes> {
    let mut piece = BytesMut::with_capacity(PIECE.min(usize::try_from(left).unwrap_or(PIECE)));
    let n = file.take(left).read_buf(&mut piece).await?;
    if n == 0 {
        let shorter = "the file is shorter than it was said to be";
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, shorter));
    }
    Ok(piece.freeze())
}

/// Whether a request moves on, so that a large upload may take long and a dead one may not.
#[derive(Debug, Clone)]
pub(crate) struct Progress {
    state: Arc<Mutex<ProgressState>>,
    stall_timeout: Duration,
    commit_timeout: Duration,
}

#[derive(Debug)]
struct ProgressState {
    last: Instant,
    left: u64,
    uploads: bool,
    failure: Option<io::Error>,
}

impl Progress {
    pub(crate) fn new(options: &ClientOptions) -> Self {
        let state = ProgressState { last: Instant::now(), left: 0, uploads: false, failure: None };
        Self {
            state: Arc::new(Mutex::new(state)),
            stall_timeout: options.stall_timeout,
            commit_timeout: options.commit_timeout,
        }
    }

    fn expect(&self, bytes: u64) {
        let mut state = self.state.lock();
        (state.left, state.uploads, state.last) = (bytes, true, Instant::now());
    }

    fn moved(&self, bytes: usize) {
        let mut state = self.state.lock();
        state.left = state.left.saturating_sub(u64::try_from(bytes).unwrap_or(u64::MAX));
        state.last = Instant::now();
    }

    fn failed(&self, error: io::Error) {
        self.state.lock().failure = Some(error);
    }

    /// How long the present step may take, and when it is over.
    fn deadline(&self) -> (Duration, Instant) {
        let state = self.state.lock();
        let sent_all = state.uploads && state.left == 0;
        let limit = if sent_all { self.commit_timeout } else { self.stall_timeout };
        (limit, state.last + limit)
    }

    /// Waits for the head of the answer.
    pub(crate) async fn watch(
        &self,
        url: &Url,
        answer: impl Future<Output = reqwest::Result<reqwest::Response>>,
    ) -> Result<reqwest::Response, FetchError> {
        let mut answer = std::pin::pin!(answer);
        loop {
            let (after, deadline) = self.deadline();
            let answered = tokio::time::timeout_at(deadline.into(), &mut answer).await;
            match answered {
                Ok(Ok(response)) => return Ok(response),
                Ok(Err(error)) => {
                    return Err(match self.state.lock().failure.take() {
                        Some(failure) => FetchError::File(failure),
                        None => FetchError::transport(url, error),
                    });
                }
                Err(_elapsed) if self.deadline().1 > deadline => {}
                Err(_elapsed) => return Err(FetchError::Stalled { url: public(url), after }),
            }
        }
    }
}

const OCI_SUBJECT: HeaderName = HeaderName::from_static("oci-subject");
const PIECE: usize = 256 << 10;
