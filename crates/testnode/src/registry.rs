//! The Docker registry, in plain HTTP or with TLS and a password, by itself or behind nginx.

use std::fs;

use anyhow::{Context, Result};

use crate::daemon::Daemon;
use crate::link::FAR_ADDRESS;
use crate::node::Node;

/// The state `LISTEN` in `/proc/net/tcp`.
const LISTENING: &str = "0A";
/// Makes a certificate authority that the node trusts, a certificate for `reg.test`, a password file,
/// and the file from which clients take that password.
const TLS_SETUP: &str = r#"
mkdir -p /etc/testnode-tls ~/.docker
cd /etc/testnode-tls
[ ! -e reg.crt ] || exit 0
key="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc"
openssl req -x509 $key -days 30 -subj '/CN=test CA' -keyout ca.key -out ca.crt
openssl req $key -subj /CN=reg.test -keyout reg.key -out reg.csr
printf 'subjectAltName=DNS:reg.test,DNS:localhost,IP:127.0.0.1\n' > names
openssl x509 -req -in reg.csr -CA ca.crt -CAkey ca.key -days 30 -extfile names -out reg.crt
cat ca.crt >> /etc/ssl/certs/ca-certificates.crt
htpasswd -C 4 -Bbn "$USER" "$PASSWORD" > passwords
printf '%s:{PLAIN}%s\n' "$USER" "$PASSWORD" > passwords-nginx
printf '{"auths":{"reg.test:%s":{"auth":"%s"}}}' "$PORT" "$(printf %s "$USER:$PASSWORD" | base64)" > ~/.docker/config.json
"#;

/// nginx as it stands before a registry: it ends TLS and checks the password, hands out the blobs from the
/// registry's storage, as the object store of a larger one would, and everything else on.
const NGINX: &str = r#"
daemon off;
user root;
worker_processes 1;
error_log stderr warn;
pid /run/nginx-testnode.pid;
events {}
http {
  access_log off;
  client_max_body_size 0;
  keepalive_requests 100000;
  default_type application/octet-stream;
  ssl_certificate /etc/testnode-tls/reg.crt;
  ssl_certificate_key /etc/testnode-tls/reg.key;
  proxy_set_header Host $http_host;
  proxy_set_header X-Forwarded-Proto https;
  proxy_http_version 1.1;
  proxy_request_buffering off;
  proxy_read_timeout 900;
  server {
    listen 0.0.0.0:PORT ssl;
    http2 on;
    auth_basic test;
    auth_basic_user_file /etc/testnode-tls/passwords-nginx;
    root /var/lib/docker-registry/docker/registry/v2;
    location / { proxy_pass http://127.0.0.1:BEHIND; }
    location @registry { proxy_pass http://127.0.0.1:BEHIND; }
    location ~ "^/v2/(.+)/blobs/sha256:(([0-9a-f]{2})[0-9a-f]{62})$" {
      error_page 404 = @registry;
      if (!-f $document_root/repositories/$1/_layers/sha256/$2/link) { return 404; }
      try_files /blobs/sha256/$3/$2/data =404;
    }
  }
}
"#;

/// A running Docker registry. Dropping it ends it; its content stays. Its log
/// (`registry-PORT`) has a line for each request.
#[derive(Debug)]
pub struct Registry {
    /// nginx before it, if there is one.
    pub front: Option<Daemon>,
    /// The process.
    pub daemon: Daemon,
    /// Host and port, as in an image's name.
    pub host: String,
    /// User and password, if it wants them.
    pub credentials: Option<(String, String)>,
}

impl Registry {
    /// User and password with a colon between them, as `--user` of `ctr` and `soci` takes them; only a
    /// colon if it asks for nothing.
    #[must_use]
    pub fn user(&self) -> String {
        let (user, password) = self.credentials.clone().unwrap_or_default();
        format!("{user}:{password}")
    }
}

impl Node {
    /// Starts a registry that speaks plain HTTP and asks for nothing, at `127.0.0.1:port`.
    ///
    /// # Errors
    /// When it does not listen within a minute.
    pub fn registry(&self, port: u16) -> Result<Registry> {
        let daemon = self.start_registry("127.0.0.1", port, "")?;
        let host = format!("127.0.0.1:{port}");
        Ok(Registry { front: None, daemon, host, credentials: None })
    }

    /// Starts a registry with TLS and basic authentication at `reg.test:port`.
    ///
    /// The node trusts its certificate, and `~/.docker/config.json` holds the password. All registries
    /// of a node share their content.
    ///
    /// # Errors
    /// When it does not listen within a minute.
    pub fn tls_registry(&self, port: u16) -> Result<Registry> {
        let credentials = self.set_tls_up(port)?;
        let daemon = self.start_registry(
            "127.0.0.1",
            port,
            "  tls: {certificate: /etc/testnode-tls/reg.crt, key: /etc/testnode-tls/reg.key}\n\
             auth:\n  htpasswd: {realm: test, path: /etc/testnode-tls/passwords}\n",
        )?;
        let host = format!("reg.test:{port}");
        Ok(Registry { front: None, daemon, host, credentials: Some(credentials) })
    }

    /// As [`Node::tls_registry`], for nodes that a link connects with this one, too: see
    /// [`Node::use_registry_of`]. The node must have a network of its own. nginx hands out its blobs, which
    /// costs the machine a fraction of what the registry itself would compute for them; that one listens at
    /// the port behind `port`.
    ///
    /// # Errors
    /// When it does not listen within a minute.
    pub fn linked_tls_registry(&self, port: u16) -> Result<Registry> {
        let credentials = self.set_tls_up(port)?;
        let behind = port.saturating_add(1);
        let daemon = self.start_registry("127.0.0.1", behind, "")?;
        let config = NGINX.replace("PORT", &port.to_string());
        let config = config.replace("BEHIND", &behind.to_string());
        self.write("/etc/testnode-tls/nginx.conf", config)?;
        let arguments = ["-c", "/etc/testnode-tls/nginx.conf"];
        let mut front = self.spawn(&format!("nginx-{port}"), "nginx", &arguments)?;
        front.wait_ready("its port", || self.is_listening(port))?;
        let host = format!("reg.test:{port}");
        Ok(Registry { front: Some(front), daemon, host, credentials: Some(credentials) })
    }

    /// Makes `reg.test` the registry of the node at the far end of a link: name, certificate and
    /// password.
    ///
    /// # Errors
    /// When `far` never had such a registry.
    pub fn use_registry_of(&self, far: &Self) -> Result<()> {
        self.write("/etc/hosts", format!("127.0.0.1 localhost node\n{FAR_ADDRESS} reg.test\n"))?;
        for file in ["etc/ssl/certs/ca-certificates.crt", "root/.docker/config.json"] {
            let content = fs::read(far.path(file)).with_context(|| format!("reading {file}"))?;
            self.write(file, content)?;
        }
        Ok(())
    }

    /// User and password of a registry at `reg.test:port`, for which everything is there then.
    fn set_tls_up(&self, port: u16) -> Result<(String, String)> {
        let (user, password) = ("tester", "correct-horse");
        self.bash(&format!("USER={user} PASSWORD={password} PORT={port}\n{TLS_SETUP}"))?;
        Ok((user.to_owned(), password.to_owned()))
    }

    fn start_registry(&self, address: &str, port: u16, more: &str) -> Result<Daemon> {
        let config = format!("/etc/docker/registry/testnode-{port}.yml");
        self.write(
            &config,
            format!(
                "version: 0.1\n\
                 log: {{level: error}}\n\
                 storage:\n  filesystem: {{rootdirectory: /var/lib/docker-registry}}\n  \
                 delete: {{enabled: true}}\n\
                 http:\n  addr: {address}:{port}\n{more}"
            ),
        )?;
        let mut daemon =
            self.spawn(&format!("registry-{port}"), "docker-registry", &["serve", &config])?;
        daemon.wait_ready("its port", || self.is_listening(port))?;
        Ok(daemon)
    }

    /// Whether something in the node listens on this TCP port, over IPv4 or IPv6.
    ///
    /// # Errors
    /// When the node is gone.
    pub fn is_listening(&self, port: u16) -> Result<bool> {
        // Looked up instead of connected to: the port is in another network namespace.
        let tables = ["tcp", "tcp6"].map(|t| format!("/proc/{}/net/{t}", self.pid1()));
        let wanted = format!(":{port:04X}");
        for table in &tables {
            let text = fs::read_to_string(table).unwrap_or_default();
            let mut sockets = text.lines().skip(1).map(|line| line.split_ascii_whitespace());
            let found = sockets.any(|mut fields| {
                fields.nth(1).is_some_and(|local| local.ends_with(&wanted))
                    && fields.nth(1) == Some(LISTENING)
            });
            if found {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
