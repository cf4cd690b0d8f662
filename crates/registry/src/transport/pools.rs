//! Pools of connections, one for each way to do TLS.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use reqwest::redirect::Policy;
use reqwest::{Certificate, Identity};

use crate::Host;
use crate::client::ClientOptions;
use crate::hosts::{ClientCertificate, LoadHostsError};
use crate::redirect::is_loopback;

/// The HTTP clients that were needed so far.
#[derive(Debug, Default)]
pub(crate) struct Pools(Mutex<HashMap<PoolKey, (Instant, reqwest::Client)>>);

/// What makes connections differ.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct PoolKey {
    skip_verify: bool,
    ca: Vec<PathBuf>,
    client: Option<ClientCertificate>,
    on_this_machine: bool,
}

impl Pools {
    /// The client for requests to `host` itself, or to where it sends us (`own` is false).
    ///
    /// There the host's authorities are trusted as well, since a private registry's storage has
    /// certificates of the same authority; our own certificate is not shown.
    pub(crate) fn client(
        &self,
        host: &Host,
        own: bool,
        options: &ClientOptions,
    ) -> Result<reqwest::Client, LoadHostsError> {
        let key = PoolKey {
            skip_verify: host.skip_verify,
            ca: host.ca.clone(),
            client: host.client.clone().filter(|_| own),
            on_this_machine: own && is_loopback(&host.base),
        };
        let mut clients = self.0.lock();
        if let Some((built, client)) = clients.get(&key) {
            let has_files = !key.ca.is_empty() || key.client.is_some();
            if !has_files || built.elapsed() < READ_CERTIFICATES_AFTER {
                return Ok(client.clone());
            }
        }
        match build(&key, options) {
            Ok(client) => {
                clients.insert(key, (Instant::now(), client.clone()));
                Ok(client)
            }
            Err(error) => match clients.get_mut(&key) {
                // Certificates that are being replaced must not stop a running container.
                Some((built, client)) => {
                    tracing::warn!(%error, "the certificates cannot be read again");
                    *built = Instant::now();
                    Ok(client.clone())
                }
                None => Err(error),
            },
        }
    }
}

/// Reads the certificates of the authorities that this machine trusts, as a client's first request does, so
/// that this need not wait for the disk. Trouble is left to who needs them.
pub fn read_authorities() {
    build(&PoolKey::default(), &ClientOptions::default()).ok();
}

fn build(key: &PoolKey, options: &ClientOptions) -> Result<reqwest::Client, LoadHostsError> {
    let mut builder = reqwest::Client::builder()
        .user_agent(&options.user_agent)
        .redirect(Policy::none())
        .referer(false)
        .http1_only()
        .no_gzip()
        .no_brotli()
        .no_zstd()
        .no_deflate()
        .connect_timeout(options.connect_timeout)
        .pool_max_idle_per_host(options.max_idle_connections)
        .pool_idle_timeout(IDLE_TIMEOUT)
        .tcp_keepalive(KEEPALIVE)
        .tls_danger_accept_invalid_certs(key.skip_verify);
    if key.on_this_machine {
        // A proxy would look for this machine's registry on itself.
        builder = builder.no_proxy();
        if key.ca.is_empty() {
            // Usually without TLS: it shall work where no authorities are installed.
            builder = builder.tls_certs_only([]);
        }
    }
    let mut authorities = Vec::new();
    for path in &key.ca {
        let certificates = Certificate::from_pem_bundle(&read(path)?)
            .map_err(|_shows_nothing_more| LoadHostsError::Certificate { path: path.clone() })?;
        if certificates.is_empty() {
            return Err(LoadHostsError::Certificate { path: path.clone() });
        }
        authorities.extend(certificates);
    }
    if !authorities.is_empty() {
        builder = builder.tls_certs_merge(authorities);
    }
    if let Some(client) = &key.client {
        builder = builder.identity(identity(client)?);
    }
    builder.build().map_err(LoadHostsError::Tls)
}

fn identity(client: &ClientCertificate) -> Result<Identity, LoadHostsError> {
    let mut pem = read(&client.cert)?;
    if let Some(key) = &client.key {
        pem.push(b'\n');
        pem.extend(read(key)?);
    }
    let path = client.key.as_ref().unwrap_or(&client.cert);
    Identity::from_pem(&pem)
        .map_err(|_might_show_the_key| LoadHostsError::Certificate { path: path.clone() })
}

fn read(path: &Path) -> Result<Vec<u8>, LoadHostsError> {
    std::fs::read(path).map_err(|source| LoadHostsError::Read { path: path.to_owned(), source })
}

const READ_CERTIFICATES_AFTER: Duration = Duration::from_secs(600);
/// Below the 60 seconds after which common load balancers close a connection.
const IDLE_TIMEOUT: Duration = Duration::from_secs(50);
const KEEPALIVE: Duration = Duration::from_secs(30);
