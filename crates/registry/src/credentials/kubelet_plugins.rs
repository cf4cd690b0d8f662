//! The kubelet's credential-provider plugins, run by ourselves: they give credentials also when nothing
//! is being pulled.
//!
//! The protocol is that of Kubernetes' KEP 2133. A plugin that wants a token of the Pod's service account
//! (KEP 4412) is left out: only the kubelet can ask for such tokens.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

use super::{CredentialSource, Credentials, CredentialsError, HelperProblem, Wanted, program};

mod answer;
mod config;
mod go_duration;
mod image_pattern;

pub use answer::{CacheKey, MalformedAnswer, PluginAnswer};
pub use config::{MalformedPluginConfig, Plugin, PluginConfig};

/// Credentials from the plugins of a `CredentialProviderConfig`, which is read anew each time they are
/// needed. Answers are kept in memory for as long as they say.
///
/// What a plugin gives is for the image, so that it is sent to mirrors of its registry as well, if they
/// ask for it: containerd does so with what the kubelet has from the plugin.
#[derive(Debug)]
pub struct KubeletPlugins {
    config: PathBuf,
    programs: PathBuf,
    time_limit: Duration,
    caches: Mutex<HashMap<String, Arc<Cache>>>,
    /// Plugins of which was said that they are left out.
    skipped: Mutex<HashSet<String>>,
}

/// The answers of a plugin. Locked while it runs: whoever else needs it waits for that answer.
type Cache = tokio::sync::Mutex<HashMap<String, Cached>>;

#[derive(Debug)]
struct Cached {
    answer: PluginAnswer,
    made: Instant,
    until: Instant,
}

impl KubeletPlugins {
    /// The plugins that the file `config` names, in the folder `programs`; each gets a minute, as from the
    /// kubelet.
    #[must_use]
    pub fn new(config: impl Into<PathBuf>, programs: impl Into<PathBuf>) -> Self {
        Self {
            config: config.into(),
            programs: programs.into(),
            time_limit: Duration::from_mins(1),
            caches: Mutex::default(),
            skipped: Mutex::default(),
        }
    }

    /// Gives plugins another time limit.
    #[must_use]
    pub const fn with_time_limit(mut self, limit: Duration) -> Self {
        self.time_limit = limit;
        self
    }

    async fn find(&self, wanted: Wanted<'_>) -> Result<Option<Credentials>, CredentialsError> {
        let image = format!("{}/{}", wanted.registry, wanted.repository);
        let config = self.read().await?;
        let mut failure = None;
        for plugin in config.plugins.iter().filter(|plugin| plugin.is_for(&image)) {
            match self.ask(plugin, wanted, &image).await {
                Ok(None) => {}
                Ok(found) => return Ok(found),
                Err(problem) => {
                    let helper = plugin.name.clone();
                    failure = failure.or(Some(CredentialsError::Helper { helper, problem }));
                }
            }
        }
        failure.map_or(Ok(None), Err)
    }

    async fn read(&self) -> Result<PluginConfig, CredentialsError> {
        let failed = |source| CredentialsError::Read { path: self.config.clone(), source };
        let file = tokio::fs::File::open(&self.config).await.map_err(failed)?;
        let mut text = String::new();
        file.take(MAX_CONFIG).read_to_string(&mut text).await.map_err(failed)?;
        let config = PluginConfig::parse(&text).map_err(|source| {
            CredentialsError::MalformedPlugins { path: self.config.clone(), source }
        })?;
        for name in &config.skipped {
            if self.skipped.lock().insert(name.clone()) {
                tracing::warn!(
                    plugin = name,
                    "a credential plugin wants a token of the Pod's service account, which only the kubelet has; \
                     it is left out"
                );
            }
        }
        Ok(config)
    }

    async fn ask(
        &self,
        plugin: &Plugin,
        wanted: Wanted<'_>,
        image: &str,
    ) -> Result<Option<Credentials>, HelperProblem> {
        let cache = Arc::clone(self.caches.lock().entry(plugin.name.clone()).or_default());
        let mut cache = cache.lock().await;
        let now = Instant::now();
        for key in [image, wanted.registry, GLOBAL] {
            let Some(cached) = cache.get(key) else { continue };
            let found = cached.next(wanted, image);
            let is_current = now < cached.until;
            // One whose answers are refused is not asked with each request.
            let rests = !wanted.refused.is_empty() && now < cached.made + REST;
            if (is_current && found.is_some()) || rests {
                return Ok(found);
            }
        }
        let answer = run(plugin, &self.programs, image, self.time_limit).await?;
        let made = Instant::now();
        let lifetime = answer.cache_duration.unwrap_or(plugin.default_cache_duration);
        let until = made.checked_add(lifetime).unwrap_or(made);
        let key = match answer.cache_key {
            CacheKey::Image => image,
            CacheKey::Registry => wanted.registry,
            CacheKey::Global => GLOBAL,
        };
        if cache.len() >= MAX_CACHED {
            cache.clear();
        }
        let cached = Cached { answer, made, until };
        let found = cached.next(wanted, image);
        cache.insert(key.to_owned(), cached);
        Ok(found)
    }
}

impl CredentialSource for KubeletPlugins {
    fn credentials<'a>(
        &'a self,
        wanted: Wanted<'a>,
    ) -> BoxFuture<'a, Result<Option<Credentials>, CredentialsError>> {
        Box::pin(self.find(wanted))
    }
}

impl Cached {
    fn next(&self, wanted: Wanted<'_>, image: &str) -> Option<Credentials> {
        self.answer.credentials(image).find_map(|found| wanted.unless_refused(found))
    }
}

async fn run(
    plugin: &Plugin,
    programs: &Path,
    image: &str,
    limit: Duration,
) -> Result<PluginAnswer, HelperProblem> {
    let mut command = Command::new(programs.join(&plugin.name));
    command.args(&plugin.args);
    command.envs(plugin.env.iter().map(|one| (&one.name, one.value.expose())));
    let question = answer::question(&plugin.api_version, image);
    let output = program::run(&mut command, &question, limit).await?.success()?;
    let parsed = PluginAnswer::parse(&output, &plugin.api_version);
    parsed.map_err(|_no_more_to_say| HelperProblem::Answer)
}

/// No image's name, and no registry's.
const GLOBAL: &str = "";
const MAX_CACHED: usize = 1024;
const MAX_CONFIG: u64 = 4 << 20;
/// For so long a plugin is not asked again that gave something that is refused.
const REST: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests;
