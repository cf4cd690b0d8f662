//! Answers requests: the OCI distribution API 1.1, a token endpoint, and a second listener for blobs.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, LOCATION, RANGE};
use http::{HeaderMap, Method, Request, StatusCode};
use hyper::body::Incoming;
use oci::Digest;

use super::answer::{Answer, Content, Unfinished};
use super::auth::{Auth, Refused, Tokens};
use super::body::{Body, Transfer, empty, wait_for_sound};
use super::connection::Control;
use super::faults::{BodyFaults, Faults, Instead, Subject};
use super::link::{self, Pacer};
use super::log::{Log, LogEntry, RequestLog};
use super::path::{Endpoint, Query};
use super::range::{RangeHeader, Requested};
use super::store::{Blob, ManifestName, Store};
use super::uploads;

/// Which of the two listeners a request came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Registry,
    Cdn,
}

/// Everything that the connections share.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) store: Store,
    pub(super) faults: Faults,
    pub(super) pacer: Pacer,
    pub(super) log: Log,
    pub(super) tokens: Tokens,
    /// `http` or `https`.
    pub(super) scheme: &'static str,
    pub(super) address: SocketAddr,
    pub(super) cdn_address: SocketAddr,
}

impl Server {
    /// Answers one request, after the link's round trip.
    ///
    /// Errors: the connection is to be dropped instead of an answer.
    pub(super) async fn serve(
        &self,
        side: Side,
        control: Arc<Control>,
        request: Request<Incoming>,
    ) -> io::Result<http::Response<Body>> {
        let log = self.log.begin(log_of(&request));
        let endpoint = match side {
            Side::Registry => Endpoint::parse(request.uri().path()),
            Side::Cdn => Endpoint::parse_cdn(request.uri().path()),
        };
        let subject = subject_of(&endpoint, request.method());
        let head_faults = self.faults.take_head(subject);
        wait_for_sound(&mut self.faults.watch_outage()).await?;
        link::sleep(self.pacer.link().latency + head_faults.delay).await?;

        let is_head = request.method() == Method::HEAD;
        let answer = match head_faults.instead {
            Some(Instead::Reset) => {
                control.reset_on_close();
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            Some(instead) => Answer::instead(instead),
            None => match self.authorize(&endpoint, &request) {
                Err(challenge) => Answer::unauthorized(&challenge),
                Ok(()) => {
                    self.route(endpoint, subject, request).await.or_else(Unfinished::answer)?
                }
            },
        };
        self.send(answer, is_head, subject, control, log)
    }

    /// Makes the response: its headers now, its body as the link and the faults let it.
    fn send(
        &self,
        answer: Answer,
        is_head: bool,
        subject: Subject,
        control: Arc<Control>,
        log: Arc<LogEntry>,
    ) -> io::Result<http::Response<Body>> {
        let Answer { status, mut headers, content } = answer;
        log.answered(status.as_u16());
        let Content { blob, start, end } = content;
        let len = end - start;
        headers.insert(CONTENT_LENGTH, len.into());
        let body = if is_head || len == 0 {
            empty()
        } else {
            let faults = if status.is_success() {
                self.faults.take_body(subject, start, len)
            } else {
                BodyFaults::default()
            };
            let transfer = Transfer {
                blob,
                at: start,
                end,
                faults,
                flow: self.pacer.flow(),
                chunk_len: self.pacer.link().chunk_len(),
                outage: self.faults.watch_outage(),
                released: self.faults.watch_released(),
                control,
                log,
            };
            transfer.into_body()
        };
        let mut response = http::Response::new(body);
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        Ok(response)
    }

    /// Checks what the registry demands; the error is the challenge that says so.
    fn authorize(&self, endpoint: &Endpoint, request: &Request<Incoming>) -> Result<(), String> {
        if matches!(endpoint, Endpoint::Token | Endpoint::Cdn(_)) {
            return Ok(());
        }
        let switches = self.faults.switches();
        let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let bearer = match &switches.auth {
            Auth::None => return Ok(()),
            Auth::Basic(credentials) if credentials.are_in(header) => return Ok(()),
            Auth::Basic(_) => return Err(BASIC_CHALLENGE.to_owned()),
            Auth::Bearer(_) => header.and_then(|value| value.strip_prefix("Bearer ")),
        };
        let action = action_of(request.method());
        let repository = endpoint.repository();
        let refused = match bearer {
            None => None,
            Some(token) => {
                let epoch = switches.auth_epoch;
                match self.tokens.check(token, epoch, repository, action) {
                    Ok(()) => return Ok(()),
                    Err(refused) => Some(refused),
                }
            }
        };
        Err(self.challenge(repository, action, refused))
    }

    fn challenge(
        &self,
        repository: Option<&str>,
        action: &str,
        refused: Option<Refused>,
    ) -> String {
        let Self { scheme, address, .. } = self;
        let mut challenge =
            format!("Bearer realm=\"{scheme}://{address}/token\",service=\"testkit\"");
        if let Some(name) = repository {
            let actions = if action == "push" { "pull,push" } else { action };
            challenge.push_str(&format!(",scope=\"repository:{name}:{actions}\""));
        }
        if let Some(refused) = refused {
            challenge.push_str(&format!(",error=\"{}\"", refused.name()));
        }
        challenge
    }

    async fn route(
        &self,
        endpoint: Endpoint,
        subject: Subject,
        request: Request<Incoming>,
    ) -> Result<Answer, Unfinished> {
        let read = matches!(*request.method(), Method::GET | Method::HEAD);
        let delete = request.method() == Method::DELETE;
        match endpoint {
            Endpoint::Base if read => Ok(Answer::json(&serde_json::json!({}))),
            Endpoint::Token => uploads::token(self, request).await,
            Endpoint::Cdn(digest) if read => Ok(self.blob(digest, subject, &request)),
            Endpoint::Blob { digest, .. } if read => {
                let redirect = request.method() == Method::GET
                    && self.faults.switches().redirect_blobs
                    && digest.is_some_and(|digest| self.store.blob(digest).is_some());
                Ok(match digest {
                    Some(digest) if redirect => self.redirect(digest),
                    _ => self.blob(digest, subject, &request),
                })
            }
            Endpoint::Blob { digest: Some(digest), .. } if delete => {
                Ok(Answer::deleted(self.store.delete_blob(digest), "BLOB_UNKNOWN"))
            }
            Endpoint::Manifest { name, reference } if read => Ok(self.manifest(&name, &reference)),
            Endpoint::Manifest { name, reference } if delete => {
                let reference = ManifestName::parse(&reference);
                let deleted = self.store.delete_manifest(&name, &reference);
                Ok(Answer::deleted(deleted, "MANIFEST_UNKNOWN"))
            }
            Endpoint::Manifest { name, reference } if request.method() == Method::PUT => {
                uploads::put_manifest(self, &name, &reference, request).await
            }
            Endpoint::Uploads { name } if request.method() == Method::POST => {
                uploads::begin(self, &name, request).await
            }
            Endpoint::Upload { name, id } => uploads::go_on(self, &name, id, request).await,
            Endpoint::Tags { name } if read => Ok(self.tags(&name)),
            Endpoint::Referrers { name, digest } if read => {
                Ok(self.referrers(&name, digest, request.uri().query()))
            }
            Endpoint::Unknown => Ok(Answer::not_found("NAME_UNKNOWN")),
            _ => Ok(Answer::error(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED")),
        }
    }

    fn redirect(&self, digest: Digest) -> Answer {
        let Self { scheme, cdn_address, .. } = self;
        let location = format!("{scheme}://{cdn_address}/cdn/{digest}?signature=testkit");
        Answer::empty(StatusCode::TEMPORARY_REDIRECT).with(LOCATION, &location)
    }

    fn blob(
        &self,
        digest: Option<Digest>,
        subject: Subject,
        request: &Request<Incoming>,
    ) -> Answer {
        let found = digest.and_then(|digest| Some((digest, self.store.blob(digest)?)));
        let Some((digest, blob)) = found else { return Answer::not_found("BLOB_UNKNOWN") };
        let len = blob.len();
        let header = range_header(request.headers());
        // HEAD has no ranges (RFC 9110, 14.2).
        let requested = match header {
            Some(range) if request.method() == Method::GET => {
                if self.faults.take_ignore_range(subject) {
                    Requested::Whole
                } else {
                    range.of(len)
                }
            }
            _ => Requested::Whole,
        };
        let (status, content) = match requested {
            Requested::Whole => (StatusCode::OK, Content { blob, start: 0, end: len }),
            Requested::Part { start, end } => {
                (StatusCode::PARTIAL_CONTENT, Content { blob, start, end })
            }
            Requested::Unsatisfiable => {
                return Answer::error(StatusCode::RANGE_NOT_SATISFIABLE, "RANGE_INVALID")
                    .with(CONTENT_RANGE, &format!("bytes */{len}"));
            }
        };
        let (start, end) = (content.start, content.end);
        let answer = Answer::blob(status, digest, content);
        if status == StatusCode::PARTIAL_CONTENT {
            return answer.with(CONTENT_RANGE, &format!("bytes {start}-{}/{len}", end - 1));
        }
        answer
    }

    fn manifest(&self, name: &str, reference: &str) -> Answer {
        match self.store.manifest(name, &ManifestName::parse(reference)) {
            None => Answer::not_found("MANIFEST_UNKNOWN"),
            Some(manifest) => {
                let content = Content::whole(Blob::Memory(manifest.bytes));
                Answer::manifest(manifest.digest, &manifest.media_type, content)
            }
        }
    }

    fn tags(&self, name: &str) -> Answer {
        match self.store.tags(name) {
            None => Answer::not_found("NAME_UNKNOWN"),
            Some(tags) => Answer::json(&serde_json::json!({ "name": name, "tags": tags })),
        }
    }

    fn referrers(&self, name: &str, subject: Option<Digest>, query: Option<&str>) -> Answer {
        let Some(subject) = subject.filter(|_| self.faults.switches().referrers) else {
            return Answer::not_found("UNSUPPORTED");
        };
        let wanted = Query(query.unwrap_or_default()).first("artifactType");
        let manifests = self.store.manifests(name);
        let descriptors = manifests.iter().filter_map(|manifest| referrer(manifest, subject));
        let descriptors: Vec<_> = descriptors
            .filter(|found| wanted.as_deref().is_none_or(|wanted| found["artifactType"] == *wanted))
            .collect();
        let index = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": INDEX_MEDIA_TYPE,
            "manifests": descriptors,
        });
        let answer = Answer::json(&index).with(http::header::CONTENT_TYPE, INDEX_MEDIA_TYPE);
        if wanted.is_some() {
            return answer.with("oci-filters-applied", "artifactType");
        }
        answer
    }
}

/// What clients are asked for who must name user and password.
pub(super) const BASIC_CHALLENGE: &str = "Basic realm=\"testkit\"";

const INDEX_MEDIA_TYPE: &str = "application/vnd.oci.image.index.v1+json";

/// The descriptor of a manifest that refers to `subject`.
fn referrer(manifest: &super::store::StoredManifest, subject: Digest) -> Option<serde_json::Value> {
    let document: serde_json::Value = serde_json::from_slice(&manifest.bytes).ok()?;
    if document["subject"]["digest"] != subject.to_string() {
        return None;
    }
    // An image manifest without a type of its own has its config's (distribution-spec 1.1).
    let artifact_type = match &document["artifactType"] {
        serde_json::Value::Null => &document["config"]["mediaType"],
        given => given,
    };
    let mut descriptor = serde_json::json!({
        "mediaType": manifest.media_type,
        "digest": manifest.digest.to_string(),
        "size": manifest.bytes.len(),
    });
    for (key, value) in [("artifactType", artifact_type), ("annotations", &document["annotations"])]
    {
        if !value.is_null() {
            descriptor[key] = value.clone();
        }
    }
    Some(descriptor)
}

fn subject_of(endpoint: &Endpoint, method: &Method) -> Subject {
    match endpoint {
        Endpoint::Token => Subject::Token,
        Endpoint::Manifest { .. } => Subject::Manifest,
        Endpoint::Blob { digest, .. } if *method != Method::DELETE => Subject::Blob(*digest),
        Endpoint::Cdn(digest) => Subject::CdnBlob(*digest),
        _ => Subject::Other,
    }
}

fn action_of(method: &Method) -> &'static str {
    match *method {
        Method::GET | Method::HEAD => "pull",
        Method::DELETE => "delete",
        _ => "push",
    }
}

fn range_header(headers: &HeaderMap) -> Option<RangeHeader> {
    RangeHeader::parse(headers.get(RANGE)?.to_str().ok()?)
}

fn log_of(request: &Request<Incoming>) -> RequestLog {
    RequestLog {
        method: request.method().to_string(),
        path: request.uri().path().to_owned(),
        range: range_header(request.headers()).and_then(RangeHeader::first_and_last),
        status: 0,
        bytes_sent: 0,
        authorization: request.headers().contains_key(AUTHORIZATION),
    }
}
