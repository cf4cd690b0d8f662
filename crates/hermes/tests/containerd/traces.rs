//! What OpenTelemetry's own collector is told of images that containerd starts.

use std::collections::HashMap;
use std::net::TcpListener;
use std::time::Instant;

use testnode::{ContainerdVersion, Daemon, Node, busybox_image, lazy_pull_config, wait_until};

use super::faults::{fetch_late, read_numbers};
use super::{
    CONFIG, PATIENCE, Pulled, SOCKET, node, policy, pull, push_index, run, start_with, status,
};

/// Where the collector listens, and how it says what it got.
const COLLECTOR: &str = "
receivers: {otlp: {protocols: {http: {endpoint: '127.0.0.1:4318'}}}}
exporters: {debug: {verbosity: detailed}}
service:
  telemetry: {metrics: {level: none}}
  pipelines: {traces: {receivers: [otlp], exporters: [debug]}}
";

/// Where Hermes sends its traces.
const TRACING: &str = "[tracing]\nendpoint = 'http://127.0.0.1:4318'\n";

/// A span as the collector shows it: what is said of it, and its attributes.
type Span = HashMap<String, String>;

fn collector(node: &Node) -> Daemon {
    node.write("/etc/collector.yaml", COLLECTOR).unwrap();
    let mut collector = node
        .spawn("collector", "/opt/peers/collector", &["--config", "/etc/collector.yaml"])
        .unwrap();
    let listens = || Ok(node.log("collector").contains("Everything is ready"));
    collector.wait_ready("the receiver", listens).unwrap();
    collector
}

/// The spans that the collector has got so far.
fn spans(node: &Node) -> Vec<Span> {
    let log = node.log("collector");
    let mut spans = Vec::new();
    for line in log.lines() {
        if line.starts_with("Span #") {
            spans.push(Span::new());
        }
        let pair = line.split_once(": ").filter(|_| line.starts_with([' ', '\t']));
        if let (Some((key, value)), Some(span)) = (pair, spans.last_mut()) {
            let key = key.trim().trim_start_matches("-> ").trim();
            let value = value.trim();
            let value = ["Str(", "Bool(", "Int("]
                .iter()
                .find_map(|kind| value.strip_prefix(kind)?.strip_suffix(')'))
                .unwrap_or(value);
            span.insert(key.to_owned(), value.to_owned());
        }
    }
    spans
}

/// The one span of this name.
#[track_caller]
fn one<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    let mut found = spans.iter().filter(|span| span["Name"] == name);
    let span = found.next().ok_or((name, spans)).unwrap();
    assert!(found.next().is_none(), "more than one {name}: {spans:#?}");
    span
}

/// Waits until the collector has a span of this name.
fn until_told(node: &Node, name: &str) -> Vec<Span> {
    let is_told = || Ok(spans(node).iter().any(|span| span["Name"] == name));
    wait_until(name, PATIENCE, is_told).unwrap();
    spans(node)
}

fn metric(node: &Node, name: &str) -> f64 {
    let page = node.run("hermes", &["metrics"]).unwrap();
    let figure = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    figure.ok_or((name, &page)).unwrap().parse().unwrap()
}

#[test]
fn a_lazy_image_is_one_trace_from_its_pull_to_its_last_byte() {
    let node = node();
    node.write(CONFIG, TRACING).unwrap();
    let _collector = collector(&node);
    let daemon = start_with(&node, &["--no-respawn"]);
    let Pulled { containerd, image, _registry } =
        pull(&node, ContainerdVersion::Newest, "lazy:1", true);
    run(&containerd, &image, "one");
    let mounts = status(&node)["mounts"].clone();
    until_told(&node, "complete");
    // A second container shares the mount.
    run(&containerd, &image, "two");
    assert!(daemon.stop().unwrap().success());
    let spans = spans(&node);
    let pull = one(&spans, "pull");
    let said = [
        ("container.image.name", image.as_str()),
        ("oci.manifest.digest", mounts[0]["digest"].as_str().unwrap()),
        ("hermes.lazy", "true"),
        ("hermes.reason", "indexed"),
        ("hermes.policy", "lazy"),
        ("Parent ID", ""),
        ("Status code", "Unset"),
    ];
    for (key, value) in said {
        assert_eq!(pull[key], value, "{key} of {pull:#?}");
    }
    assert!(pull["hermes.index"].contains("3 of 3 layers have one"), "{pull:#?}");
    let (mount, complete) = (one(&spans, "mount"), one(&spans, "complete"));
    assert_eq!(mount["hermes.backend"], "erofs");
    assert_eq!(complete["hermes.bytes"], mounts[0]["bytes_total"].to_string());
    for (span, parent) in [(mount, pull), (complete, mount), (one(&spans, "find-index"), pull)] {
        assert_eq!(span["Parent ID"], parent["ID"], "{span:#?}");
    }
    for span in &spans {
        assert_eq!(span["Trace ID"], pull["Trace ID"], "{span:#?}");
        assert_eq!(span["Status code"], "Unset", "{span:#?}");
    }
    // Each layer of the pull is asked for, and many files are read.
    assert!(spans.len() < 30, "{} spans", spans.len());
}

#[test]
fn a_read_that_waited_is_told_with_its_file() {
    let node = node();
    node.write(CONFIG, TRACING).unwrap();
    fetch_late(&node, 300);
    let _collector = collector(&node);
    let _daemon = start_with(&node, &["--no-respawn"]);
    let Pulled { containerd, image, _registry } =
        pull(&node, ContainerdVersion::Newest, "lazy:1", true);
    until_told(&node, "mount");
    drop(_registry);
    let _registry = std::thread::scope(|scope| {
        let container = scope.spawn(|| read_numbers(&containerd, &image, "one"));
        let waits = || Ok(status(&node)["mounts"][0]["waiting_seconds"].as_f64() > Some(1.0));
        wait_until("a read to wait", PATIENCE, waits).unwrap();
        let registry = node.registry(5000).unwrap();
        container.join().unwrap().unwrap();
        registry
    });
    let spans = until_told(&node, "first-read");
    let (mount, read) = (one(&spans, "mount"), one(&spans, "first-read"));
    assert_eq!((&read["Parent ID"], &read["Trace ID"]), (&mount["ID"], &mount["Trace ID"]));
    // The kernel reads ahead: it may be the file before.
    assert!(read["hermes.file"].starts_with("/"), "{read:#?}");
    assert_ne!(read["process.pid"], "0");
    let slow = spans.iter().filter(|span| span["Name"] == "slow-read").count();
    assert!(slow < 16, "{slow} slow reads");
}

/// What is told of an image without an index that containerd unpacks.
fn unpacked(name: &str) -> Vec<Span> {
    let node = node();
    node.write(CONFIG, TRACING).unwrap();
    let down = policy("prefix: '127.0.0.1:5000/down'").replace("name: lazy", "name: down");
    node.write("/etc/hermes/policies/down.yaml", down).unwrap();
    // ctr does not read it: containerd has the registry, Hermes one that nobody listens at.
    let hosts = "server = 'http://127.0.0.1:1'\n";
    node.write("/etc/containerd/certs.d/127.0.0.1:5000/hosts.toml", hosts).unwrap();
    let _collector = collector(&node);
    let _daemon = start_with(&node, &["--no-respawn"]);
    pull(&node, ContainerdVersion::Newest, name, false);
    until_told(&node, "pull")
}

#[test]
fn an_image_that_is_not_lazy_says_why() {
    let spans = unpacked("other:1");
    let [pull] = &spans[..] else { panic!("nothing else is asked: {spans:#?}") };
    assert_eq!((&*pull["hermes.reason"], &*pull["Status code"]), ("no-policy", "Unset"));
    assert_eq!((&*pull["hermes.lazy"], &*pull["hermes.policy"]), ("false", ""));

    let spans = unpacked("down:1");
    let (pull, resolve) = (one(&spans, "pull"), one(&spans, "resolve"));
    assert_eq!(
        (&*pull["hermes.reason"], &*pull["hermes.policy"]),
        ("registry-unavailable", "down")
    );
    for failed in [pull, resolve] {
        assert_eq!(failed["Status code"], "Error", "{failed:#?}");
        assert!(failed["Status message"].contains("http://127.0.0.1:1"), "{failed:#?}");
    }
    assert_eq!(resolve["Parent ID"], pull["ID"]);
}

#[test]
fn an_image_that_hermes_fetches_whole_says_how_much() {
    let node = node();
    node.write(CONFIG, format!("{TRACING}[containerd]\neager = 'stream'\n")).unwrap();
    let _collector = collector(&node);
    let _daemon = start_with(&node, &["--no-respawn"]);
    let Pulled { containerd, image, _registry } =
        pull(&node, ContainerdVersion::Newest, "lazy:1", false);
    run(&containerd, &image, "one");
    let spans = until_told(&node, "mount");
    let fetch = one(&spans, "fetch");
    assert_eq!(fetch["hermes.layers"], "3");
    assert!(fetch["hermes.bytes"].parse::<u64>().unwrap() > 12_000_000);
    assert_eq!(one(&spans, "pull")["hermes.reason"], "streamed");
    assert_eq!(fetch["Trace ID"], one(&spans, "pull")["Trace ID"]);
    // Nothing is missing.
    assert!(!spans.iter().any(|span| ["first-read", "complete"].contains(&&*span["Name"])));
}

/// Everything else goes on, at the same speed; the log says it once.
#[test]
fn a_dead_collector_costs_nothing_but_the_traces() {
    let node = node();
    node.write(CONFIG, TRACING).unwrap();
    let daemon = start_with(&node, &["--no-respawn"]);
    let Pulled { containerd, image, _registry } =
        pull(&node, ContainerdVersion::Newest, "lazy:1", true);
    run(&containerd, &image, "one");
    let drops = || metric(&node, "hermes_dropped_spans_total");
    wait_until("spans to be dropped", PATIENCE, || Ok(drops() >= 1.0)).unwrap();
    let before = drops();
    node.run("hermes", &["mount", &image, "/mnt"]).unwrap();
    wait_until("more to be dropped", PATIENCE, || Ok(drops() > before)).unwrap();
    assert_eq!(daemon.log().matches("traces are not taken").count(), 1, "{}", daemon.log());
    // It is there now, and gets what comes.
    let collector = collector(&node);
    node.run("hermes", &["umount", "/mnt"]).unwrap();
    node.run("hermes", &["mount", &image, "/mnt"]).unwrap();
    until_told(&node, "mount");
    assert!(metric(&node, "hermes_exported_spans_total") >= 1.0);
    assert!(daemon.log().contains("traces are taken again"), "{}", daemon.log());
    // The end does not wait for one that does not answer.
    collector.kill().unwrap();
    let silent = node.in_network(|| TcpListener::bind("127.0.0.1:4318")).unwrap().unwrap();
    node.run("hermes", &["umount", "/mnt"]).unwrap();
    node.run("hermes", &["mount", &image, "/mnt"]).unwrap();
    let begin = Instant::now();
    assert!(daemon.stop().unwrap().success());
    assert!(begin.elapsed() < PATIENCE / 2, "{:?}", begin.elapsed());
    drop(silent);
}

#[test]
fn a_pull_is_part_of_containerds_trace() {
    let node = node();
    node.write(CONFIG, TRACING).unwrap();
    let _collector = collector(&node);
    let _daemon = start_with(&node, &["--no-respawn"]);
    let registry = node.registry(5000).unwrap();
    let image = busybox_image(&node, &registry, "lazy:1").unwrap();
    push_index(&node, &image);
    let to_collector = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
    ];
    let config = lazy_pull_config("hermes", SOCKET);
    let newest = ContainerdVersion::Newest;
    let containerd = node.containerd_with(newest, &config, &to_collector).unwrap();
    containerd.ctr(&["image", "pull", "--plain-http", "--snapshotter", "hermes", &image]).unwrap();
    run(&containerd, &image, "one");
    let is_part = || {
        let spans = spans(&node);
        let own = |name: &str| spans.iter().find(|span| span["Name"] == name);
        let (Some(pull), Some(mount)) = (own("pull"), own("mount")) else { return Ok(false) };
        let mut calls = spans.iter().filter(|span| span["Name"].ends_with("Snapshots/Prepare"));
        let is_in_it = pull["Trace ID"] == mount["Trace ID"];
        Ok(is_in_it && calls.any(|call| call["ID"] == pull["Parent ID"]))
    };
    wait_until("containerd's span", PATIENCE, is_part).unwrap();
}
