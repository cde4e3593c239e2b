//! curl, over HTTP/1.1 and over HTTP/2 without TLS.

use std::{
    env, fs,
    net::SocketAddr,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use tokio::task::spawn_blocking;

use super::{
    UPLOAD,
    results::Results,
    servers::{REJECTS, Rejects, SERVED, Served, start},
};
use crate::support::{alone, programs::skip};

/// Options that let curl send the body at once, over each version of HTTP.
const VERSIONS: [&[&str]; 2] =
    [&["--http1.1", "--header", "expect:"], &["--http2-prior-knowledge"]];

fn is_installed() -> bool {
    let version = Command::new("curl").arg("--version").output();
    version.is_ok_and(|version| String::from_utf8_lossy(&version.stdout).contains("HTTP2"))
}

/// A file of the size of an upload.
fn file() -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("upload");
    // Tests run at the same time.
    let own = path.with_extension(format!("{:?}", std::thread::current().id()));
    fs::write(&own, vec![0; UPLOAD]).unwrap();
    fs::rename(&own, &path).unwrap();
    path
}

/// Makes `count` uploads in sequence.
async fn uploads(
    what: String,
    addr: SocketAddr,
    options: &'static [&str],
    count: usize,
) -> Results {
    let uploads = move || {
        let body = format!("@{}", file().display());
        let curl = Command::new("curl")
            .args(["--silent", "--show-error", "--max-time", "10", "--output", "/dev/null"])
            .args([
                "--write-out",
                "%{http_code} %{exitcode} %{time_total}\n",
                "--data-binary",
                &body,
            ])
            .args(options)
            // One upload for each number, each over a connection of its own: curl 7.88 fails when it reuses a
            // connection to a server whose support of HTTP/2 is prior knowledge.
            .arg(format!("http://upload[1-{count}].test:{}/", addr.port()))
            .args(["--resolve", &format!("*:{}:{}", addr.port(), addr.ip())])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let mut results = Results::default();
        for line in String::from_utf8_lossy(&curl.stdout).lines() {
            let words: Vec<_> = line.split(' ').collect();
            let [status, exit_code, time] = words[..] else { panic!("curl wrote {line:?}") };
            let result = match exit_code {
                "0" => Ok(status.parse().unwrap()),
                _ => Err(String::from_utf8_lossy(&curl.stderr).into_owned()),
            };
            results.add(&what, result, Duration::from_secs_f64(time.parse().unwrap()));
        }
        results
    };
    spawn_blocking(uploads).await.unwrap()
}

async fn all_arrive(served: Served, options: &'static [&str]) {
    if !is_installed() {
        return skip("curl with HTTP/2");
    }
    let _alone = alone().await;
    let server = start(served, Rejects::LimitFull).await;
    let results = uploads(format!("{served:?}"), server.addr, options, 200).await;
    results.assert_all_arrived(200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rejection_reaches_curl_under_axum_serve() {
    all_arrive(Served::Axum, VERSIONS[0]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rejection_reaches_curl_under_lifecycle_serve() {
    all_arrive(Served::Lifecycle, VERSIONS[0]).await;
}

// The tests over HTTP/2 run on one thread. With several, hyper sometimes writes the HEADERS and the DATA of a response
// apart (about 1 of 3,000). curl 7.88 then ends its upload before the `content-length`, which is a stream error
// (RFC 9113 §8.1.1), and the rest of the response is lost. The layers cannot join the two frames.

#[tokio::test]
async fn rejection_reaches_curl_over_http2_under_axum_serve() {
    all_arrive(Served::Axum, VERSIONS[1]).await;
}

#[tokio::test]
async fn rejection_reaches_curl_over_http2_under_lifecycle_serve() {
    all_arrive(Served::Lifecycle, VERSIONS[1]).await;
}

/// Also with curl's own `Expect: 100-continue`, after which it waits for the response.
#[tokio::test]
async fn rejection_of_each_layer_reaches_curl() {
    if !is_installed() {
        return skip("curl with HTTP/2");
    }
    let _alone = alone().await;
    let mut results = Results::default();
    for rejects in REJECTS {
        for served in SERVED {
            let server = start(served, rejects).await;
            for options in VERSIONS.into_iter().chain([&["--http1.1"][..]]) {
                let what = format!("{rejects:?} under {served:?} with {options:?}");
                results.extend(uploads(what, server.addr, options, 2).await);
            }
        }
    }
    results.assert_all_arrived(120);
}
