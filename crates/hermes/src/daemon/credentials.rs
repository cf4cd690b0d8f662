//! The credentials of a node of Kubernetes: what its kubelet gives with pulls, and its plugins.
//!
//! What was given is in memory only: in ours, and in a memory file that the keeper holds, from which the
//! next daemon has it. A reboot takes both.

use std::fmt;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use mounts::Holding;
use oci::Reference;
use parking_lot::Mutex;
use registry::{
    Chain, CredentialSource, Given, GivenCredentials, KubeletPlugins, PullAuth, Secret,
};
use snapshotter::PullCredentials;

use crate::config::CredentialsConfig;

/// Credentials that nobody configured for Hermes.
pub(super) struct NodeCredentials {
    given: Arc<GivenCredentials>,
    plugins: Option<Arc<KubeletPlugins>>,
    holding: Arc<Holding>,
    /// Locked while something new is held, so that it is the newest.
    turn: Mutex<()>,
}

impl fmt::Debug for NodeCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeCredentials").field("given", &self.given).finish_non_exhaustive()
    }
}

impl NodeCredentials {
    /// Takes over what the keeper holds of a predecessor.
    pub(super) fn new(config: &CredentialsConfig, holding: Arc<Holding>) -> Self {
        let plugins = config.kubelet_config.as_ref().zip(config.kubelet_bin_dir.as_ref());
        let plugins = plugins.map(|(config, dir)| Arc::new(KubeletPlugins::new(config, dir)));
        let given = Arc::new(GivenCredentials::new());
        if let Some((_, held)) = holding.get(HELD) {
            let read = sys::memory_file::read(&File::from(held), MOST_HELD);
            let restored = read.map(|bytes| given.restore(&bytes));
            if !matches!(restored, Ok(Ok(()))) {
                tracing::error!(
                    "the credentials of earlier pulls are lost; images pulled with them need others, or another pull"
                );
            }
        }
        Self { given, plugins, holding, turn: Mutex::default() }
    }

    /// What was given with pulls first, then Docker's configuration, then the plugins.
    pub(super) fn with(&self, docker: Option<Arc<dyn CredentialSource>>) -> Chain {
        let mut sources: Vec<Arc<dyn CredentialSource>> = vec![Arc::clone(&self.given) as _];
        sources.extend(docker);
        sources.extend(self.plugins.iter().map(|plugins| Arc::clone(plugins) as _));
        Chain::new(sources)
    }

    /// Has the keeper hold what there is now.
    fn hold(&self) {
        let _turn = self.turn.lock();
        let held = sys::memory_file::make("hermes-credentials", &self.given.expose())
            .and_then(|file| self.holding.put(HELD, &[], file.as_fd()));
        if let Err(error) = held {
            tracing::warn!(%error, "the credentials of pulls will not outlive the daemon");
        }
    }
}

impl PullCredentials for NodeCredentials {
    fn remember(&self, image: &str, auth: &snapshotter::PullAuth) {
        let Some((image, given)) = understood(image, auth) else { return };
        if self.given.remember(&image, &given) {
            tracing::debug!(%image, "the credentials of a pull are kept");
            self.hold();
        }
    }

    fn forget(&self, image: &str, auth: &snapshotter::PullAuth) {
        let Some((image, given)) = understood(image, auth) else { return };
        if self.given.forget(&image, &given) {
            tracing::info!(%image, "the registry did not accept the credentials of a pull");
            self.hold();
        }
    }
}

/// Nothing if there is nothing to be kept.
fn understood(image: &str, auth: &snapshotter::PullAuth) -> Option<(Reference, Given)> {
    let image: Reference = image.parse().ok()?;
    let snapshotter::PullAuth { username, password, auth, server_address, identity_token } =
        auth.clone();
    let (password, auth) = (Secret::new(password), Secret::new(auth));
    let identity_token = Secret::new(identity_token);
    let auth = PullAuth { username, password, auth, server_address, identity_token };
    match auth.given() {
        Ok(given) => Some((image, given?)),
        Err(error) => {
            tracing::warn!(%image, %error, "they are not kept");
            None
        }
    }
}

/// What they are held as.
const HELD: &str = "credentials";

/// What is remembered of pulls is less.
const MOST_HELD: usize = 64 << 20;
