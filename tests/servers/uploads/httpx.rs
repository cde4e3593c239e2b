//! httpx over HTTP/2. It sends the whole request before it reads the response.

use std::{
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use tokio::task::spawn_blocking;

use super::{
    results::Results,
    servers::{Rejects, SERVED, start},
};
use crate::support::{alone, programs::skip};

const SIZE: usize = 2 * 1024 * 1024;

/// Makes `count` uploads in sequence. Returns `None` if httpx is not installed in the virtual environment.
async fn uploads(what: String, addr: SocketAddr, count: usize) -> Option<Results> {
    let uploads = move || {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let python = root.join("target/peers-venv/bin/python");
        let httpx = Command::new(python)
            .arg(root.join("tests/servers/uploads/upload.py"))
            .args([addr.to_string(), count.to_string(), SIZE.to_string()])
            .stdin(Stdio::null())
            .output()
            .ok()?;
        let errors = String::from_utf8_lossy(&httpx.stderr);
        if errors.contains("ModuleNotFoundError") || errors.contains("ImportError") {
            return None;
        }
        assert!(httpx.status.success(), "{errors}");
        let mut results = Results::default();
        for line in String::from_utf8_lossy(&httpx.stdout).lines() {
            let (seconds, result) = line.split_once(' ').unwrap();
            let result = result.parse().map_err(|_| result.to_owned());
            results.add(&what, result, Duration::from_secs_f64(seconds.parse().unwrap()));
        }
        Some(results)
    };
    spawn_blocking(uploads).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rejection_reaches_httpx_over_http2() {
    let _alone = alone().await;
    let mut results = Results::default();
    // A limit that rejects before the body is polled, and a timeout that drops the body while it is read.
    for rejects in [Rejects::LimitFull, Rejects::TimedOut] {
        for served in SERVED {
            let server = start(served, rejects).await;
            let what = format!("{rejects:?} under {served:?}");
            let Some(more) = uploads(what, server.addr, 5).await else { return skip("httpx") };
            results.extend(more);
        }
    }
    results.assert_all_arrived(20);
}
