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
    Ok(Access { hosts_dir: std::path::absolute(&arguments.hosts_dir)?, docker_config })
}

/// A client for `access`.
pub(crate) fn client(access: &Access) -> Client {
    let credentials: Arc<dyn CredentialSource> = match &access.docker_config {
        Some(path) => Arc::new(DockerConfig::new(path.clone())),
        None => Arc::new(Anonymous),
    };
    let hosts_dirs = vec![access.hosts_dir.clone()];
    Client::new(ClientOptions { hosts_dirs, credentials, ..ClientOptions::default() })
}

fn home() -> Option<PathBuf> {
    std::env::home_dir()
}
