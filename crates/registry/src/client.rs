//! The client: what all repositories share.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use oci::Reference;
use parking_lot::Mutex;

use crate::auth::Authority;
use crate::credentials::Anonymous;
use crate::hosts::{self, LoadHostsError};
use crate::redirect::RedirectCache;
use crate::transport::{Pools, Server};
use crate::{CredentialSource, FetchError, Host, Repository, RetryPolicy};

/// How registries are reached.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// The user agent; `hermes/<version>`.
    pub user_agent: String,
    /// Folders in the form of containerd's `certs.d`; the first that has one for the registry, or
    /// a `_default`, counts.
    pub hosts_dirs: Vec<PathBuf>,
    /// The servers of registries by name, in the order in which they are asked, the registry's own
    /// last. Counts more than the folders.
    pub hosts: BTreeMap<String, Vec<Host>>,
    /// Hosts, with the port if they have one, that speak plain HTTP. This machine does anyway.
    pub plain_http: BTreeSet<String>,
    /// Where credentials come from.
    pub credentials: Arc<dyn CredentialSource>,
    /// How long a connection may take to be made; ten seconds.
    pub connect_timeout: Duration,
    /// How long to wait for the next byte; thirty seconds.
    pub stall_timeout: Duration,
    /// How long a server may think about an upload after its last byte; five minutes.
    pub commit_timeout: Duration,
    /// How many idle connections are kept to a server.
    pub max_idle_connections: usize,
    /// When small requests are made again.
    pub retry: RetryPolicy,
    /// For how long a server that failed is asked last; ten seconds, doubled with each failure up
    /// to five minutes.
    pub rest: Duration,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            user_agent: concat!("hermes/", env!("CARGO_PKG_VERSION")).to_owned(),
            hosts_dirs: Vec::new(),
            hosts: BTreeMap::new(),
            plain_http: BTreeSet::new(),
            credentials: Arc::new(Anonymous),
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            commit_timeout: Duration::from_secs(300),
            max_idle_connections: 64,
            retry: RetryPolicy::default(),
            rest: Duration::from_secs(10),
        }
    }
}

/// A client of all registries. Cloning gives another handle to the same connections and tokens.
#[derive(Debug, Clone)]
pub struct Client {
    pub(crate) shared: Arc<Shared>,
    pub(crate) identity: Arc<Identity>,
}

/// What does not depend on who asks.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) options: ClientOptions,
    pub(crate) pools: Pools,
    servers: Mutex<HashMap<String, KnownServers>>,
}

/// What one user of the registries has been given. Signed URLs count as such: whoever has one needs
/// no credentials.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) authority: Authority,
    pub(crate) redirects: RedirectCache,
}

#[derive(Debug, Clone)]
struct KnownServers {
    loaded: Instant,
    servers: Arc<[Arc<Server>]>,
}

impl Client {
    /// A client; nothing is read or connected yet.
    #[must_use]
    pub fn new(options: ClientOptions) -> Self {
        let identity = Arc::new(Identity::new(Arc::clone(&options.credentials)));
        let servers = Mutex::default();
        let shared = Shared { options, pools: Pools::default(), servers };
        Self { shared: Arc::new(shared), identity }
    }

    /// The same client for somebody else: connections are shared, tokens are not.
    #[must_use]
    pub fn with_credentials(&self, credentials: Arc<dyn CredentialSource>) -> Self {
        let identity = Arc::new(Identity::new(credentials));
        Self { shared: Arc::clone(&self.shared), identity }
    }

    /// The repository that an image lies in.
    #[must_use]
    pub fn repository(&self, image: &Reference) -> Repository {
        Repository::new(self.clone(), image)
    }
}

impl Identity {
    fn new(credentials: Arc<dyn CredentialSource>) -> Self {
        Self { authority: Authority::new(credentials), redirects: RedirectCache::default() }
    }
}

impl Shared {
    /// The servers of a registry, in their configured order.
    ///
    /// The folders are read again now and then, so that a changed mirror needs no restart. If they
    /// cannot be read then, what was known goes on to count.
    pub(crate) fn servers(&self, registry: &str) -> Result<Arc<[Arc<Server>]>, FetchError> {
        let known = self.servers.lock().get(registry).cloned();
        if let Some(known) = &known
            && known.loaded.elapsed() < RELOAD_HOSTS_AFTER
        {
            return Ok(Arc::clone(&known.servers));
        }
        let servers: Arc<[Arc<Server>]> = match (self.load_hosts(registry), &known) {
            (Ok(hosts), known) => {
                let old = known.as_ref().map(|known| &*known.servers).unwrap_or_default();
                let last = hosts.len().saturating_sub(1);
                let server = |(at, host): (usize, Host)| {
                    let same = old.iter().find(|server| server.host == host);
                    same.cloned().unwrap_or_else(|| Server::new(host, registry, at == last).into())
                };
                hosts.into_iter().enumerate().map(server).collect()
            }
            (Err(error), Some(known)) => {
                tracing::warn!(registry, %error, "the hosts configuration cannot be read again");
                Arc::clone(&known.servers)
            }
            (Err(source), None) => {
                let registry = registry.to_owned();
                return Err(FetchError::Misconfigured { registry, source: Box::new(source) });
            }
        };
        let known = KnownServers { loaded: Instant::now(), servers: Arc::clone(&servers) };
        self.servers.lock().insert(registry.to_owned(), known);
        Ok(servers)
    }

    fn load_hosts(&self, registry: &str) -> Result<Vec<Host>, LoadHostsError> {
        if let Some(hosts) = self.options.hosts.get(registry) {
            return Ok(hosts.clone());
        }
        for dir in &self.options.hosts_dirs {
            if hosts::has_folder(dir, registry) {
                return hosts::load(dir, registry);
            }
        }
        let plain = self.options.plain_http.contains(registry);
        Ok(vec![hosts::own_server(registry, plain)?])
    }
}

/// A hosts folder is a few hundred bytes, so it is simply read where it is needed.
const RELOAD_HOSTS_AFTER: Duration = Duration::from_secs(60);
