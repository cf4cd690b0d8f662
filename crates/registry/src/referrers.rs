//! What refers to a manifest: the referrers API, and the tag that stands in where there is none.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::join;
use oci::media_type::{DOCKER_MANIFEST, OCI_EMPTY, OCI_INDEX, OCI_MANIFEST};
use oci::{Descriptor, Digest, Index, Manifest, ManifestOrIndex, parse_manifest};
use reqwest::header::{ACCEPT, HeaderMap, LINK};
use reqwest::{Method, StatusCode, Url};

use crate::error::public;
use crate::transport::{Call, Exchange, Server, content_type};
use crate::{Capability, FetchError, Repository};

impl Repository {
    /// The artifacts that refer to the manifest `subject`, in the registry's order; of one type
    /// only if any are given.
    ///
    /// Asks the referrers API, and where there is none looks at the tag `sha256-<hex>`. The type
    /// of an artifact is its `artifactType`, else the media type of its configuration.
    ///
    /// # Errors
    /// That there are none is an empty list, not an error.
    pub async fn referrers(
        &self,
        subject: &Digest,
        artifact_types: &[&str],
    ) -> Result<Vec<Descriptor>, FetchError> {
        let found = self
            .retry(Capability::Resolve, |server| async move {
                self.exchange(&server).referrers(subject, artifact_types).await
            })
            .await;
        match found {
            Err(FetchError::NotFound { .. }) => Ok(Vec::new()),
            found => found,
        }
    }

    /// Adds `referrer` to the tag that lists the referrers of `subject`.
    ///
    /// Registries do not make this atomic. Writers in this process take turns; after a writer
    /// elsewhere has won a race, the entry is added again.
    pub(crate) async fn add_to_fallback_tag(
        &self,
        server: &Arc<Server>,
        subject: &Digest,
        referrer: &Descriptor,
    ) -> Result<(), FetchError> {
        let exchange = self.exchange(server);
        let tag = fallback_tag(subject);
        let _turn = FALLBACK_TAG_WRITER.lock().await;
        for _attempt in 0..FALLBACK_TAG_ATTEMPTS {
            let mut index = match exchange.fallback_index(subject).await {
                Ok(index) => index,
                Err(FetchError::NotFound { .. }) => Index::new(Vec::new()),
                Err(error) => return Err(error),
            };
            if index.manifests.iter().any(|entry| entry.digest == referrer.digest) {
                return Ok(());
            }
            index.manifests.push(referrer.clone());
            index.media_type = Some(OCI_INDEX.to_owned());
            let bytes = Bytes::from(index.to_bytes());
            exchange.put_manifest(&tag, OCI_INDEX, bytes).await?;
        }
        // The last one was written but not seen again; whoever overwrote it may do so once more.
        let url = public(&exchange.url(&format!("manifests/{tag}")));
        let index = exchange.fallback_index(subject).await?;
        if index.manifests.iter().any(|entry| entry.digest == referrer.digest) {
            return Ok(());
        }
        Err(FetchError::Malformed { url, what: "the list of referrers does not keep an entry" })
    }
}

impl Exchange<'_> {
    async fn referrers(
        &self,
        subject: &Digest,
        artifact_types: &[&str],
    ) -> Result<Vec<Descriptor>, FetchError> {
        let mut listed = self.listed_or_tagged(subject, artifact_types).await?;
        if artifact_types.is_empty() {
            return Ok(listed);
        }
        let mut looked_up = 0;
        let mut found = Vec::new();
        for mut entry in listed.drain(..) {
            if entry.artifact_type.is_none() && looked_up < MAX_LOOK_UPS {
                looked_up += 1;
                entry.artifact_type = self.artifact_type_of(&entry).await?;
            }
            if entry.artifact_type.as_deref().is_some_and(|found| artifact_types.contains(&found)) {
                found.push(entry);
            }
        }
        Ok(found)
    }

    async fn listed_or_tagged(
        &self,
        subject: &Digest,
        artifact_types: &[&str],
    ) -> Result<Vec<Descriptor>, FetchError> {
        let listed = self.listed_referrers(subject, artifact_types);
        let (listed, tagged) = if self.server.has_referrers_api() {
            (listed.await?, None)
        } else {
            // Both at once: one after the other costs a round trip more where there is no API.
            let (listed, tagged) = join(listed, self.fallback_index(subject)).await;
            (listed?, Some(tagged))
        };
        match (listed, tagged) {
            (Some(listed), _) => {
                self.server.found_referrers_api();
                Ok(listed)
            }
            (None, Some(tagged)) => Ok(tagged?.manifests),
            (None, None) => Ok(self.fallback_index(subject).await?.manifests),
        }
    }

    /// What the API lists, or `None` if there is no API.
    async fn listed_referrers(
        &self,
        subject: &Digest,
        artifact_types: &[&str],
    ) -> Result<Option<Vec<Descriptor>>, FetchError> {
        let mut url = self.url(&format!("referrers/{subject}"));
        // The API filters by one type at most.
        if let [artifact_type] = artifact_types {
            url.query_pairs_mut().append_pair("artifactType", artifact_type);
        }
        let mut listed = Vec::new();
        for _page in 0..MAX_PAGES {
            let call = Call::new(Method::GET, url.clone()).header(ACCEPT, OCI_INDEX);
            let answer = self.call(&call).await?;
            match answer.response.status() {
                StatusCode::OK => {}
                // By the specification only 404, but gateways answer with what they like.
                StatusCode::NOT_FOUND
                | StatusCode::BAD_REQUEST
                | StatusCode::METHOD_NOT_ALLOWED
                | StatusCode::NOT_ACCEPTABLE
                | StatusCode::NOT_IMPLEMENTED
                    if listed.is_empty() =>
                {
                    return Ok(None);
                }
                _ => return Err(self.refusal(answer).await),
            }
            if content_type(answer.response.headers()) != Some(OCI_INDEX) {
                return Ok(None);
            }
            let next = next_page(answer.response.headers(), &url);
            let shown = public(&url);
            let page = self.read(answer, crate::repository::MAX_MANIFEST).await?;
            listed.extend(parse_index(&page, shown)?.manifests);
            match next.filter(|next| self.is_own(next)) {
                Some(next) if listed.len() < MAX_REFERRERS => url = next,
                _ => break,
            }
        }
        Ok(Some(listed))
    }

    async fn fallback_index(&self, subject: &Digest) -> Result<Index, FetchError> {
        let tag = fallback_tag(subject);
        let url = public(&self.url(&format!("manifests/{tag}")));
        let (_, bytes) = self.manifest(&tag).await?;
        parse_index(&bytes, url)
    }

    /// The type of a referrer that its list does not tell.
    async fn artifact_type_of(&self, entry: &Descriptor) -> Result<Option<String>, FetchError> {
        if !matches!(entry.media_type.as_str(), OCI_MANIFEST | DOCKER_MANIFEST) {
            return Ok(None);
        }
        let bytes = match self.manifest(&entry.digest.to_string()).await {
            Ok((_, bytes)) => bytes,
            // An entry whose manifest is gone refers to nothing.
            Err(FetchError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        match parse_manifest(Some(&entry.media_type), &bytes) {
            Ok(ManifestOrIndex::Manifest(manifest)) => {
                Ok(Some(manifest.effective_artifact_type().to_owned()))
            }
            _ => Ok(None),
        }
    }
}

/// Describes a manifest as its subject's list of referrers does.
pub(crate) fn referrer_entry(media_type: &str, bytes: &[u8], manifest: &Manifest) -> Descriptor {
    let artifact_type = Some(manifest.effective_artifact_type())
        .filter(|artifact_type| !artifact_type.is_empty() && *artifact_type != OCI_EMPTY)
        .map(ToOwned::to_owned);
    let annotations = manifest.annotations.clone();
    Descriptor { artifact_type, annotations, ..Descriptor::of(media_type, bytes) }
}

fn fallback_tag(subject: &Digest) -> String {
    format!("sha256-{}", subject.hex())
}

fn parse_index(bytes: &[u8], url: String) -> Result<Index, FetchError> {
    match parse_manifest(Some(OCI_INDEX), bytes) {
        Ok(ManifestOrIndex::Index(index)) => Ok(index),
        _ => Err(FetchError::Malformed { url, what: "the list of referrers is not an index" }),
    }
}

/// The next page by the `Link` header: `</v2/…>; rel="next"`.
fn next_page(headers: &HeaderMap, url: &Url) -> Option<Url> {
    let links = headers.get_all(LINK).iter().filter_map(|value| value.to_str().ok());
    let mut next = links.flat_map(|value| value.split(',')).filter_map(|link| {
        let (target, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
        let is_next = parameters.split(';').any(|parameter| {
            let parameter: String = parameter.split_whitespace().collect();
            parameter.eq_ignore_ascii_case("rel=\"next\"")
                || parameter.eq_ignore_ascii_case("rel=next")
        });
        if is_next { url.join(target).ok() } else { None }
    });
    next.next()
}

/// Takes turns over all tags: writers are few, and a wait is short.
static FALLBACK_TAG_WRITER: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
const FALLBACK_TAG_ATTEMPTS: u32 = 3;
const MAX_PAGES: u32 = 20;
const MAX_REFERRERS: usize = 10_000;
const MAX_LOOK_UPS: u32 = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_page_is_found() {
        let url = Url::parse("https://r.io/v2/a/referrers/sha256:1?n=2").unwrap();
        for (link, expected) in [
            ("</v2/a?page=2>; rel=\"next\"", Some("https://r.io/v2/a?page=2")),
            ("<?page=2>;rel=next", Some("https://r.io/v2/a/referrers/sha256:1?page=2")),
            ("</p>; rel=\"prev\", </n>; REL=\"next\"", Some("https://r.io/n")),
            ("</v2/a?page=2>; rel=\"prev\"", None),
            ("garbage", None),
            ("<", None),
        ] {
            let headers = HeaderMap::from_iter([(LINK, link.parse().unwrap())]);
            let next = next_page(&headers, &url);
            assert_eq!(next.as_ref().map(Url::as_str), expected, "{link}");
        }
    }
}
