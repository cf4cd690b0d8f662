//! Private images: credentials of the kubelet's pulls and plugins, and its image service through Hermes.

use testkit::registry::{Auth, BearerAuth, Credentials, Options};

use super::*;

/// Where the kubelet finds its image service.
const ENDPOINT: &str = "unix:///run/hermes/containerd.sock";

const PASSWORD: &str = "correct-horse";

/// Starts a daemon that the keeper starts again, with an image service, what more the configuration says,
/// and `selector` for lazy images, which are not completed.
fn start(node: &Node, selector: &str, more: &str) -> Daemon {
    let config = format!("[containerd]\naddress = \"/run/containerd/containerd.sock\"\n{more}");
    node.write(CONFIG, config).unwrap();
    let policy = policy(selector) + "  completion: never\n";
    node.write("/etc/hermes/policies/lazy.yaml", policy).unwrap();
    let arguments = ["--log", "debug,registry=trace", "daemon", "--config", CONFIG];
    let mut daemon = node.spawn("hermes", "hermes", &arguments).unwrap();
    let socket = node.path(SOCKET);
    daemon.wait_ready("its socket", || Ok(UnixStream::connect(&socket).is_ok())).unwrap();
    daemon
}

/// A containerd whose CRI finds the hosts of registries where Hermes does.
fn containerd(node: &Node, version: ContainerdVersion, pause: &str) -> Containerd {
    let plugin = match version < ContainerdVersion::Packaged {
        true => "io.containerd.grpc.v1.cri",
        false => "io.containerd.cri.v1.images",
    };
    let hosts =
        format!("[plugins.\"{plugin}\".registry]\nconfig_path = \"/etc/containerd/certs.d\"\n");
    let config = cri_config(version, "hermes", SOCKET, pause) + &hosts;
    let containerd = node.containerd(version, &config).unwrap();
    let is_served = || Ok(cri(node, &["images", "v1"]).is_ok());
    wait_until("CRI", PATIENCE, is_served).unwrap();
    containerd
}

fn cri(node: &Node, arguments: &[&str]) -> anyhow::Result<String> {
    node.run("/opt/peers/cri", arguments)
}

/// Pulls as a kubelet whose image service is Hermes.
fn pull_with(node: &Node, auth: &str, image: &str) -> anyhow::Result<String> {
    cri(node, &["-endpoint", ENDPOINT, "-auth", auth, "pull", image])
}

fn n_blobs_of_pods(containerd: &Containerd) -> usize {
    let list = containerd.ctr(&["--namespace", "k8s.io", "content", "ls", "--quiet"]).unwrap();
    list.lines().count()
}

/// Pushes the image that keeps a Pod's namespaces open.
fn push_pause(node: &Node, host: &str, tls: bool) -> String {
    let sleep =
        "umoci config --image /srv/images:bb --tag pause --config.cmd /bin/sleep --config.cmd 1000";
    node.bash(sleep).unwrap();
    let (pause, tls) = (format!("{host}/pause:1"), format!("--dest-tls-verify={tls}"));
    let copy = ["copy", "--quiet", &tls, "oci:/srv/images:pause", &format!("docker://{pause}")];
    node.run("skopeo", &copy).unwrap();
    pause
}

/// Kills the daemon, and waits for the one that the keeper starts.
fn replace(node: &Node) {
    let pid = || -> anyhow::Result<String> {
        let status: Value =
            serde_json::from_str(&node.run("hermes", &["--output", "json", "status"])?)?;
        Ok(status["daemon"]["pid"].to_string())
    };
    let before = pid().unwrap();
    node.run("kill", &["-KILL", &before]).unwrap();
    let is_another = || Ok(pid().is_ok_and(|pid| pid != before));
    wait_until("another daemon", PATIENCE, is_another).unwrap();
}

/// Neither in the log, nor in any file of the daemon.
fn check_nothing_secret_is_left(node: &Node, secrets: &[&str]) {
    for secret in secrets {
        assert!(!node.log("hermes").contains(secret), "{secret} is in the log");
        let search =
            format!("grep --recursive --files-with-matches -e '{secret}' /var/lib/hermes || true");
        assert_eq!(node.bash(&search).unwrap(), "", "{secret} is in a file");
    }
}

/// The digest of a file of the image, as a Pod sees it.
fn digest_in_pod(node: &Node, image: &str, file: &str) -> String {
    // Without a volume.
    let printed = cri(node, &["run", image, "", "/bin/sha256sum", file]).unwrap();
    printed.split_whitespace().next().unwrap_or_default().to_owned()
}

/// The registry wants a password over TLS, with a certificate of its own authority. Only the pull has the
/// password, and a daemon that is killed leaves it to the next.
fn private_images_are_lazy(version: ContainerdVersion) {
    let node = node();
    node.bash("cp /etc/ssl/certs/ca-certificates.crt /srv/authorities").unwrap();
    let registry = node.tls_registry(5000).unwrap();
    let image = busybox_image(&node, &registry, "lazy:1").unwrap();
    push_index(&node, &image);
    let pause = push_pause(&node, &registry.host, true);
    node.bash("rm -r ~/.docker; cp /srv/authorities /etc/ssl/certs/ca-certificates.crt").unwrap();
    let host = format!("https://{}", registry.host);
    let hosts = format!(
        "server = \"{host}\"\n[host.\"{host}\"]\ncapabilities = [\"pull\", \"resolve\"]\n\
         ca = \"/etc/testnode-tls/ca.crt\"\n"
    );
    node.write(&format!("/etc/containerd/certs.d/{}/hosts.toml", registry.host), hosts).unwrap();
    let daemon = start(&node, "glob: 'reg.test:5000/lazy*'", "");
    let containerd = containerd(&node, version, &pause);
    let right = registry.user();

    let refused = pull_with(&node, "tester:battery-staple", &image).unwrap_err().to_string();
    assert!(daemon.log().contains("did not accept the credentials of a pull"), "{refused}");
    pull_with(&node, &right, &image).unwrap();
    assert_eq!(n_blobs_of_pods(&containerd), 2, "{}", daemon.log());
    pull_with(&node, &right, &pause).unwrap();
    assert_eq!(digest_in_pod(&node, &image, "/data/numbers"), NUMBERS_SHA256);
    replace(&node);
    until_containerd_is_served(&containerd);
    check_busybox_output(&cri(&node, &["run", &image]).unwrap());
    check_nothing_secret_is_left(
        &node,
        // As a header has them, too.
        &[PASSWORD, "battery-staple", "dGVzdGVyOmNvcnJlY3QtaG9yc2U"],
    );
    cri(&node, &["-endpoint", ENDPOINT, "rmi", &image]).unwrap();
}

#[test]
fn private_images_are_lazy_on_containerd_1_7() {
    private_images_are_lazy(ContainerdVersion::V1_7);
}

#[test]
fn private_images_are_lazy_on_containerd_2_4() {
    private_images_are_lazy(ContainerdVersion::Newest);
}

/// A registry that gives tokens for a password, and a plugin of the kubelet.
struct WithTokens {
    node: Node,
    registry: testkit::registry::Registry,
    image: String,
    pause: String,
}

impl WithTokens {
    fn new() -> Self {
        let node = node();
        let options = Options { address: "127.0.0.1:5000".parse().unwrap(), ..Options::default() };
        let start = || testkit::registry::Registry::start(options).unwrap();
        let registry = node.in_network(start).unwrap();
        // As the functions want it that push images.
        let open = Registry { host: "127.0.0.1:5000".to_owned(), ..node.registry(5001).unwrap() };
        let image = busybox_image(&node, &open, "lazy:1").unwrap();
        push_index(&node, &image);
        let pause = push_pause(&node, &open.host, false);
        let made = Self { node, registry, image, pause };
        made.demand(PASSWORD);
        made
    }

    /// Makes this the password; what was given out is good no more.
    fn demand(&self, password: &str) {
        let auth = BearerAuth {
            credentials: Some(Credentials::new("tester", password)),
            lifetime: Some(Duration::from_secs(1)),
            ..BearerAuth::default()
        };
        self.registry.faults().set_auth(Auth::Bearer(auth));
        self.registry.faults().expire_tokens();
    }

    /// Makes this what the kubelet's plugin says.
    fn install_plugin(&self, password: &str) {
        let version = "credentialprovider.kubelet.k8s.io/v1";
        let config = format!(
            "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n\
             - name: plugin\n  matchImages: ['127.0.0.1:5000']\n  defaultCacheDuration: 1h\n  \
             apiVersion: {version}\n"
        );
        self.node.write("/etc/kubernetes/credentials.yaml", config).unwrap();
        let script = format!(
            "#!/bin/sh\ngrep -q '\"image\":\"127.0.0.1:5000/lazy\"' || exit 1\n\
             echo '{{\"kind\":\"CredentialProviderResponse\",\"apiVersion\":\"{version}\",\
             \"cacheKeyType\":\"Registry\",\"auth\":{{\"127.0.0.1:5000\":\
             {{\"username\":\"tester\",\"password\":\"{password}\"}}}}}}'\n"
        );
        self.node.write("/opt/plugins/plugin", script).unwrap();
        self.node.run("chmod", &["755", "/opt/plugins/plugin"]).unwrap();
    }

    fn start(&self) -> Daemon {
        let plugins = "[credentials]\nkubelet_config = \"/etc/kubernetes/credentials.yaml\"\n\
                       kubelet_bin_dir = \"/opt/plugins\"\n";
        start(&self.node, "glob: '127.0.0.1:5000/lazy*'", plugins)
    }
}

/// First the registry's token expires, then the daemon is killed, then the password changes.
#[test]
fn credentials_are_renewed_while_a_mount_lives() {
    let all = WithTokens::new();
    let WithTokens { node, registry, image, pause } = &all;
    all.install_plugin("battery-staple");
    let daemon = all.start();
    let containerd = containerd(node, ContainerdVersion::Newest, pause);
    let auth = format!("tester:{PASSWORD}");
    pull_with(node, &auth, image).unwrap();
    assert_eq!(n_blobs_of_pods(&containerd), 2, "{}", daemon.log());
    pull_with(node, &auth, pause).unwrap();
    digest_in_pod(node, image, "/app/run");

    let fetched_after = |change: &dyn Fn(), file: &str| {
        change();
        registry.clear_requests();
        let digest = digest_in_pod(node, image, file);
        assert!(registry.blob_requests() > 0, "{file} was there already");
        digest
    };
    let digest = fetched_after(&|| registry.faults().expire_tokens(), "/data/numbers");
    assert_eq!(digest, NUMBERS_SHA256);
    replace(node);
    until_containerd_is_served(&containerd);
    all.demand("battery-staple");
    let noise = fetched_after(&|| {}, "/data/noise");
    let unpack = "umoci unpack --image /srv/images:bb /srv/unpacked >&2";
    let sum = format!("{unpack}; sha256sum < /srv/unpacked/rootfs/data/noise");
    assert_eq!(node.bash(&sum).unwrap().split_whitespace().next(), Some(noise.as_str()));
    check_nothing_secret_is_left(node, &[PASSWORD, "battery-staple", "Bearer token-"]);
}

/// The pull went around Hermes.
#[test]
fn a_kubelets_plugin_gives_what_a_pull_did_not() {
    let all = WithTokens::new();
    let WithTokens { node, image, pause, .. } = &all;
    all.install_plugin(PASSWORD);
    let daemon = all.start();
    node.run("hermes", &["config", "check"]).unwrap();
    let containerd = containerd(node, ContainerdVersion::Packaged, pause);
    let auth = format!("tester:{PASSWORD}");
    cri(node, &["-auth", &auth, "pull", image]).unwrap();
    assert_eq!(n_blobs_of_pods(&containerd), 2, "{}", daemon.log());
    cri(node, &["-auth", &auth, "pull", pause]).unwrap();
    check_busybox_output(&cri(node, &["run", image]).unwrap());
    check_nothing_secret_is_left(node, &[PASSWORD]);
    node.write("/etc/kubernetes/credentials.yaml", "kind: Config\napiVersion: v1\n").unwrap();
    let refused = node.run("hermes", &["config", "check"]).unwrap_err().to_string();
    assert!(refused.contains("credentials.yaml cannot be used"), "{refused}");
}

/// What containerd says of images, of disks and of methods that it does not know.
fn the_image_service_is_containerds(version: ContainerdVersion, interfaces: &[&str]) {
    let node = node();
    let registry = node.registry(5000).unwrap();
    let image = busybox_image(&node, &registry, "lazy:1").unwrap();
    let daemon = start(&node, "glob: 'nothing'", "");
    let containerd = containerd(&node, version, &image);
    cri(&node, &["-endpoint", ENDPOINT, "pull", &image]).unwrap();
    for interface in interfaces {
        let ask =
            |endpoint: &str| cri(&node, &["-endpoint", endpoint, "images", interface]).unwrap();
        let direct = ask("unix:///run/containerd/containerd.sock");
        assert!(direct.contains(&image) && direct.contains("unknown method"), "{direct}");
        let streams = !direct.contains("unknown method StreamImages");
        assert_eq!(streams, version == ContainerdVersion::Newest, "{direct}");
        assert_eq!(ask(ENDPOINT), direct);
    }
    drop(containerd);
    let refused = cri(&node, &["-endpoint", ENDPOINT, "images", "v1"]).unwrap_err().to_string();
    assert!(refused.contains("Unavailable") && refused.contains("[containerd]"), "{refused}");
    assert!(daemon.log().contains("containerd was not asked"));
}

#[test]
fn the_image_service_is_containerds_on_containerd_1_7() {
    the_image_service_is_containerds(ContainerdVersion::V1_7, &["v1", "v1alpha2"]);
}

#[test]
fn the_image_service_is_containerds_on_containerd_2_4() {
    the_image_service_is_containerds(ContainerdVersion::Newest, &["v1"]);
}
