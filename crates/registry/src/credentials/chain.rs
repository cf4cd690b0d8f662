//! Several sources, of which the first counts that has something.

use std::sync::Arc;

use futures_util::future::BoxFuture;

use super::{CredentialSource, Credentials, CredentialsError, Wanted};

/// Asks one source after the other. One that fails is passed over, if another one has something.
#[derive(Debug, Clone)]
pub struct Chain {
    sources: Vec<Arc<dyn CredentialSource>>,
}

impl Chain {
    /// These sources, in this order.
    #[must_use]
    pub fn new(sources: Vec<Arc<dyn CredentialSource>>) -> Self {
        Self { sources }
    }

    async fn find(&self, wanted: Wanted<'_>) -> Result<Option<Credentials>, CredentialsError> {
        let mut failure: Option<CredentialsError> = None;
        for source in &self.sources {
            match source.credentials(wanted).await {
                Ok(found) => {
                    let found = found.and_then(|found| wanted.unless_refused(found));
                    if found.is_some() {
                        if let Some(error) = failure {
                            let server = wanted.server;
                            tracing::warn!(server, %error, "a source of credentials is passed over");
                        }
                        return Ok(found);
                    }
                }
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        failure.map_or(Ok(None), Err)
    }
}

impl CredentialSource for Chain {
    fn credentials<'a>(
        &'a self,
        wanted: Wanted<'a>,
    ) -> BoxFuture<'a, Result<Option<Credentials>, CredentialsError>> {
        Box::pin(self.find(wanted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Anonymous, DockerConfig, Secret, StaticCredentials};

    fn token(text: &str) -> Credentials {
        Credentials::RegistryToken(Secret::new(text))
    }

    #[tokio::test]
    async fn the_next_source_is_asked_when_one_has_nothing_or_is_refused() {
        let own = |server: &str, text: &str| -> Arc<dyn CredentialSource> {
            Arc::new(StaticCredentials::new(server, token(text)))
        };
        // A folder is no file.
        let broken: Arc<dyn CredentialSource> = Arc::new(DockerConfig::new("/"));
        let chain = Chain::new(vec![
            Arc::new(Anonymous),
            own("r.io", "1"),
            broken,
            own("r.io", "2"),
            own("s.io", "3"),
        ]);
        let check = async |server: &str, refused: &[&str], expected: Option<&str>| {
            let refused: Vec<_> = refused.iter().map(|text| token(text)).collect();
            let wanted = Wanted { server, registry: server, repository: "a", refused: &refused };
            let found = chain.credentials(wanted).await;
            match expected {
                Some(text) => assert_eq!(found.unwrap(), Some(token(text))),
                None => assert!(matches!(found, Err(CredentialsError::Read { .. }))),
            }
        };
        check("r.io", &[], Some("1")).await;
        check("r.io", &["1"], Some("2")).await;
        check("r.io", &["2", "1"], None).await;
        check("s.io", &[], Some("3")).await;
    }
}
