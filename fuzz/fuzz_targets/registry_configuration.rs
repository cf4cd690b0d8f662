#![no_main]
//! Configurations of registries, containerd's `hosts.toml`, Docker's `config.json` and the kubelet's
//! plugins with their answers: any bytes are read or refused, and what is read can be used.

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use registry::{DockerConfigFile, PluginAnswer, PluginConfig, hosts};

const SERVER: &str = "registry.example:5000";
const REPOSITORY: &str = "team/app";

fuzz_target!(|bytes: &[u8]| {
    if let Ok(config) = DockerConfigFile::parse(bytes) {
        std::hint::black_box(config.helper(SERVER));
        config.stored(SERVER, REPOSITORY).ok();
        config.stored("docker.io", "library/busybox").ok();
    }
    let image = format!("{SERVER}/{REPOSITORY}");
    if let Ok(answer) = PluginAnswer::parse(bytes, "credentialprovider.kubelet.k8s.io/v1") {
        std::hint::black_box(answer.credentials(&image).count());
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(config) = PluginConfig::parse(text) {
        for plugin in config.plugins {
            std::hint::black_box(plugin.is_for(&image));
            assert!(!plugin.name.contains('/'), "{plugin:?}");
        }
    }
    let path = Path::new("/etc/containerd/certs.d/registry.example/hosts.toml");
    match hosts::parse(path, text, SERVER) {
        Ok(servers) => {
            assert!(!servers.is_empty(), "the registry itself is always there");
            for server in servers {
                assert!(matches!(server.base.scheme(), "http" | "https"));
                assert!(server.base.has_host() && server.base.query().is_none());
                assert!(server.base.username().is_empty() && server.base.password().is_none());
                let path = server.base.path();
                assert!(path == "/" || !path.ends_with('/'), "{}", server.base);
            }
        }
        // One line, whatever the text is.
        Err(error) => assert!(!error.to_string().contains('\n'), "{error:?}"),
    }
});
