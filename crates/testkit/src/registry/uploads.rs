//! Requests with a body: uploads, manifests, and the token endpoint's forms.

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE};
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use oci::Digest;

use super::answer::{Answer, DIGEST_HEADER, Unfinished};
use super::auth::{Auth, BearerAuth};
use super::path::Query;
use super::serve::{BASIC_CHALLENGE, Server};
use super::store::{FinishUploadError, ManifestName};

/// Manifests and forms beyond this are refused, as registries do.
const DOCUMENT_LIMIT: usize = 4 << 20;

/// Begins an upload, or does it in one go (`?digest=`), or finds that it is not needed (`?mount=`).
pub(super) async fn begin(
    server: &Server,
    name: &str,
    request: Request<Incoming>,
) -> Result<Answer, Unfinished> {
    let query = request.uri().query().unwrap_or_default().to_owned();
    let mount = Query(&query).first("mount").and_then(|digest| digest.parse::<Digest>().ok());
    if let Some(digest) = mount.filter(|&digest| server.store.blob(digest).is_some()) {
        return Ok(created(&format!("/v2/{name}/blobs/{digest}"), digest));
    }
    let id = server.store.begin_upload()?;
    if let Some(digest) = Query(&query).first("digest") {
        receive(server, id, request).await?;
        return finish(server, name, id, &digest);
    }
    Ok(progress(StatusCode::ACCEPTED, name, id, 0))
}

/// Continues, ends, asks for or abandons an upload.
pub(super) async fn go_on(
    server: &Server,
    name: &str,
    id: u64,
    request: Request<Incoming>,
) -> Result<Answer, Unfinished> {
    let Some(received) = server.store.upload_len(id) else { return Ok(unknown_upload()) };
    match *request.method() {
        Method::GET => Ok(progress(StatusCode::NO_CONTENT, name, id, received)),
        Method::DELETE => {
            server.store.abandon_upload(id);
            Ok(Answer::empty(StatusCode::NO_CONTENT))
        }
        Method::PATCH | Method::PUT => {
            if begins_at(request.headers()).is_some_and(|start| start != received) {
                return Ok(progress(StatusCode::RANGE_NOT_SATISFIABLE, name, id, received));
            }
            let put = request.method() == Method::PUT;
            let digest = Query(request.uri().query().unwrap_or_default()).first("digest");
            let Some(received) = receive(server, id, request).await? else {
                return Ok(unknown_upload());
            };
            match digest {
                Some(digest) if put => finish(server, name, id, &digest),
                None if put => Ok(Answer::error(StatusCode::BAD_REQUEST, "DIGEST_INVALID")),
                _ => Ok(progress(StatusCode::ACCEPTED, name, id, received)),
            }
        }
        _ => Ok(Answer::error(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED")),
    }
}

/// Stores a manifest whose blobs are here.
pub(super) async fn put_manifest(
    server: &Server,
    name: &str,
    reference: &str,
    request: Request<Incoming>,
) -> Result<Answer, Unfinished> {
    let media_type = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let media_type = media_type.unwrap_or("application/vnd.oci.image.manifest.v1+json").to_owned();
    let Some(bytes) = document(request).await? else {
        return Ok(Answer::error(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID"));
    };
    let Ok(manifest) = serde_json::from_slice::<serde_json::Value>(&bytes) else {
        return Ok(Answer::error(StatusCode::BAD_REQUEST, "MANIFEST_INVALID"));
    };
    if !blobs_of(&manifest).all(|digest| server.store.blob(digest).is_some()) {
        return Ok(Answer::error(StatusCode::NOT_FOUND, "MANIFEST_BLOB_UNKNOWN"));
    }
    let tag = match ManifestName::parse(reference) {
        ManifestName::Digest(digest) if digest != Digest::of(&bytes) => {
            return Ok(Answer::error(StatusCode::BAD_REQUEST, "DIGEST_INVALID"));
        }
        ManifestName::Digest(_) => None,
        ManifestName::Tag(tag) => Some(tag),
    };
    let digest = server.store.put_manifest(name, tag.as_deref(), &media_type, bytes);
    let answer = created(&format!("/v2/{name}/manifests/{digest}"), digest);
    match manifest["subject"]["digest"].as_str() {
        Some(subject) if server.faults.switches().referrers => {
            Ok(answer.with("oci-subject", subject))
        }
        _ => Ok(answer),
    }
}

/// Gives out a token: to a `GET` as Docker's token specification has it, to a `POST` as OAuth 2.
pub(super) async fn token(
    server: &Server,
    request: Request<Incoming>,
) -> Result<Answer, Unfinished> {
    let switches = server.faults.switches();
    let Auth::Bearer(auth) = switches.auth else { return Ok(Answer::not_found("UNSUPPORTED")) };
    let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let by_header = auth.credentials.as_ref().is_none_or(|known| known.are_in(header));
    let (allowed, query) = match *request.method() {
        Method::GET => (by_header, request.uri().query().unwrap_or_default().to_owned()),
        Method::POST => {
            let Some(form) = document(request).await? else {
                return Ok(Answer::error(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID"));
            };
            let form = String::from_utf8_lossy(&form).into_owned();
            (by_header || form_allows(server, &auth, Query(&form)), form)
        }
        _ => return Ok(Answer::error(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED")),
    };
    if !allowed {
        return Ok(Answer::unauthorized(BASIC_CHALLENGE));
    }
    let scopes = Query(&query).all("scope");
    let scopes = scopes.iter().flat_map(|scope| scope.split(' ')).map(str::to_owned).collect();
    let token = server.tokens.issue(&auth, switches.auth_epoch, scopes);
    let mut document = serde_json::json!({ "token": token, "access_token": token });
    if let Some(lifetime) = auth.lifetime {
        document["expires_in"] = lifetime.as_secs().max(1).into();
    }
    let offline = ["offline_token", "access_type"]
        .iter()
        .any(|key| Query(&query).first(key).is_some_and(|v| v == "true" || v == "offline"));
    if offline {
        document["refresh_token"] = server.tokens.issue_refresh(switches.auth_epoch).into();
    }
    Ok(Answer::json(&document))
}

fn form_allows(server: &Server, auth: &BearerAuth, form: Query<'_>) -> bool {
    match form.first("grant_type").as_deref() {
        Some("refresh_token") => {
            form.first("refresh_token").is_some_and(|token| server.tokens.is_refresh(&token))
        }
        Some("password") => auth.credentials.as_ref().is_some_and(|known| {
            form.first("username").as_ref() == Some(&known.user)
                && form.first("password").as_ref() == Some(&known.password)
        }),
        _ => false,
    }
}

/// Adds the request's body to an upload; `None` if that is gone.
async fn receive(
    server: &Server,
    id: u64,
    request: Request<Incoming>,
) -> Result<Option<u64>, Unfinished> {
    let mut body = request.into_body();
    let mut received = server.store.upload_len(id);
    while let Some(frame) = body.frame().await {
        if let Ok(bytes) = frame?.into_data() {
            received = server.store.extend_upload(id, &bytes)?;
        }
    }
    Ok(received)
}

fn finish(server: &Server, name: &str, id: u64, digest: &str) -> Result<Answer, Unfinished> {
    let Ok(digest) = digest.parse::<Digest>() else {
        return Ok(Answer::error(StatusCode::BAD_REQUEST, "DIGEST_INVALID"));
    };
    match server.store.finish_upload(id, digest) {
        Ok(()) => Ok(created(&format!("/v2/{name}/blobs/{digest}"), digest)),
        Err(FinishUploadError::Unknown) => Ok(unknown_upload()),
        Err(FinishUploadError::Digest { .. }) => {
            Ok(Answer::error(StatusCode::BAD_REQUEST, "DIGEST_INVALID"))
        }
        Err(FinishUploadError::Io(err)) => Err(err.into()),
    }
}

fn created(location: &str, digest: Digest) -> Answer {
    Answer::empty(StatusCode::CREATED)
        .with(LOCATION, location)
        .with(DIGEST_HEADER, &digest.to_string())
}

fn progress(status: StatusCode, name: &str, id: u64, received: u64) -> Answer {
    Answer::empty(status)
        .with(LOCATION, &format!("/v2/{name}/blobs/uploads/{id}"))
        .with(RANGE, &format!("0-{}", received.saturating_sub(1)))
}

fn unknown_upload() -> Answer {
    Answer::not_found("BLOB_UPLOAD_UNKNOWN")
}

/// The offset that a chunk says it begins at: `Content-Range: <first>-<last>`, without a unit.
fn begins_at(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_RANGE)?.to_str().ok()?.split_once('-')?.0.parse().ok()
}

/// Config and layers. The manifests of an index and a subject may come later.
fn blobs_of(manifest: &serde_json::Value) -> impl Iterator<Item = Digest> {
    let layers = manifest["layers"].as_array().into_iter().flatten();
    let descriptors = layers.chain(std::iter::once(&manifest["config"]));
    descriptors.filter_map(|descriptor| descriptor["digest"].as_str()?.parse().ok())
}

/// The whole body of a request; `None` if it is too long for a document.
async fn document(request: Request<Incoming>) -> Result<Option<Bytes>, Unfinished> {
    let mut body = request.into_body();
    let mut document = Vec::new();
    while let Some(frame) = body.frame().await {
        if let Ok(bytes) = frame?.into_data() {
            if document.len() + bytes.len() > DOCUMENT_LIMIT {
                return Ok(None);
            }
            document.extend_from_slice(&bytes);
        }
    }
    Ok(Some(document.into()))
}
