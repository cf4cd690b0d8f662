//! Clients of registries, as the command line describes them.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use registry::{Anonymous, Client, ClientOptions, CredentialSource, DockerConfig};

use crate::args::RegistryArguments;
use crate::protocol::Access;

/// What the command line says, with absolute paths: the daemon has another working folder.
pub(crate) fn access(arguments: &RegistryArguments) -> Result<Access> {
    let docker_config = match &arguments.docker_config {
        Some(path) => Some(std::path::absolute(path)?),
        None => home().map(|home| home.join(".docker/config.json")),
    };
    Ok(Access {
        hosts_dir: std::path::absolute(&arguments.hosts_dir)?,
        docker_config,
        kubelet: false,
    })
}

/// A client for `access`, with no credentials but those of Docker's configuration.
pub(crate) fn client(access: &Access) -> Client {
    client_with(access, docker(access).unwrap_or_else(|| Arc::new(Anonymous)))
}

/// The credentials of Docker's configuration, if `access` names one.
pub(crate) fn docker(access: &Access) -> Option<Arc<dyn CredentialSource>> {
    let path = access.docker_config.clone()?;
    Some(Arc::new(DockerConfig::new(path)))
}

/// A client for `access` with these credentials.
pub(crate) fn client_with(access: &Access, credentials: Arc<dyn CredentialSource>) -> Client {
    let hosts_dirs = vec![access.hosts_dir.clone()];
    Client::new(ClientOptions { hosts_dirs, credentials, ..ClientOptions::default() })
}

/// Does what the first TLS connection of a process would otherwise wait for, in a thread of its own:
/// gathers randomness, and has the authorities in memory that this machine trusts.
pub(crate) fn get_ready() -> std::io::Result<()> {
    let get_ready = || {
        if let Some(provider) = rustls::crypto::CryptoProvider::get_default() {
            // Whoever needs some gets the error.
            provider.secure_random.fill(&mut [0]).ok();
        }
        registry::read_authorities();
    };
    std::thread::Builder::new().name("tls".to_owned()).spawn(get_ready).map(drop)
}

fn home() -> Option<PathBuf> {
    std::env::home_dir()
}

#[cfg(test)]
mod tests {
    use rustls::NamedGroup;

    #[test]
    fn keys_that_withstand_a_quantum_computer_and_others_are_offered_at_once() {
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let first = provider.kx_groups.first().unwrap().start().unwrap();
        assert_eq!(first.group(), NamedGroup::X25519MLKEM768);
        let (component, _) = first.hybrid_component().unwrap();
        assert_eq!(component, NamedGroup::X25519);
    }
}
