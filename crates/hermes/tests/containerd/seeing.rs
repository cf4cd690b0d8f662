//! What an operator sees of images that containerd started: metrics and `top`.

use std::io::{Read, Write};
use std::net::TcpStream;

use testnode::{ContainerdVersion, Node};

use super::{CONFIG, Pulled, node, pull, run, start_with};

/// What a web server in the node answers.
fn get(node: &Node, address: &str, path: &str) -> String {
    let mut answer = String::new();
    let ask = || {
        let mut stream = TcpStream::connect(address)?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n")?;
        stream.read_to_string(&mut answer)
    };
    node.in_network(ask).unwrap().unwrap();
    answer
}

#[test]
fn prometheus_is_told_what_happened() {
    let node = node();
    node.write(CONFIG, "[metrics]\naddress = '127.0.0.1:9464'\n[cache]\nquota = '1g'\n").unwrap();
    // Else all of an image as small as this may be there before the container reads it.
    let on_demand = "program,completion,small-layers,small-files,directories";
    let _daemon = start_with(&node, &["--no-respawn", "--without", on_demand]);
    let Pulled { containerd, image, _registry } =
        pull(&node, ContainerdVersion::Newest, "lazy:1", true);
    run(&containerd, &image, "one");
    let page = get(&node, "127.0.0.1:9464", "/metrics");
    assert!(page.starts_with("HTTP/1.1 200 OK"), "{page}");
    let printed = node.run("hermes", &["metrics"]).unwrap();
    for page in [&page, &printed] {
        let figure = |name: &str| {
            let mut lines = page.lines().filter_map(|line| line.strip_prefix(name));
            lines
                .next()
                .and_then(|figure| figure.trim().parse::<f64>().ok())
                .ok_or((name, page))
                .unwrap()
        };
        let cases = [
            ("hermes_decisions_total{reason=\"indexed\"}", 1.0),
            ("hermes_decisions_total{reason=\"no-index\"}", 0.0),
            ("hermes_policies", 1.0),
            ("hermes_policy_errors", 0.0),
            ("hermes_mount_seconds_count", 1.0),
            ("hermes_cache_quota_bytes", f64::from(1 << 30)),
            ("hermes_keeper_up", 1.0),
            ("hermes_waiting_reads", 0.0),
            ("hermes_revoked_indexes_total", 0.0),
        ];
        for (name, expected) in cases {
            let found = figure(&format!("{name} "));
            assert!((found - expected).abs() < 0.5, "{name} is {found} in {page}");
        }
        assert!(figure("hermes_fetched_bytes_total ") > 1e6, "{page}");
        assert!(figure("hermes_read_wait_seconds_count ") >= 1.0, "{page}");
        assert!(page.contains("hermes_mounts{backend=\"erofs\",state=\"served\"} 1"), "{page}");
        assert!(!page.contains("lazy:1") && !page.contains("sha256"), "of what, not which: {page}");
        assert!(page.trim_end().ends_with("# EOF"), "{page}");
    }
    assert!(get(&node, "127.0.0.1:9464", "/").starts_with("HTTP/1.1 404"));
    let top = node.run("hermes", &["top"]).unwrap();
    assert!(top.contains("1 mounts") && top.contains("127.0.0.1:5000/lazy@sha256"), "{top}");
}
