//! Real signals: each test is its own child process too, which serves and is told to end.

use std::{net::SocketAddr, process::Stdio, time::Duration};

use axum::{Extension, Router, body::Body, routing::get};
use buttress::{Health, Lifecycle, lifecycle::Drain};
use bytes::Bytes;
use futures_util::stream;
use http::StatusCode;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};

use crate::{
    health_drain_http::{ask, http1},
    net::{listener, soon},
};

// ===== The child =====

const CHILD: &str = "BUTTRESS_TEST_CHILD";
/// Far more than a test takes.
const AGES: Duration = Duration::from_secs(600);

fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Serves once it is told to by a line; what it says is on lines of their own.
async fn serve(delay: Duration, longest: Duration) {
    let health = Health::new();
    let lifecycle = Lifecycle::new(&health).unwrap().delay(delay).longest(longest);
    println!("\narmed");
    let told = tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new()));
    told.await.unwrap().unwrap();
    let (hook, inside) = (lifecycle.clone(), lifecycle.clone());
    let app = Router::new()
        .route("/quick", get(async || "quick"))
        .route(
            "/slow",
            get(async |Extension(drain): Extension<Drain>| {
                drain.stopping().await;
                "done"
            }),
        )
        .route("/deaf", get(async || Body::from_stream(stream::pending::<Result<Bytes, String>>())))
        .route("/inside", get(async move || inside.in_flight().to_string()))
        .route("/hook", get(async move || hook.drain()))
        .layer(health.endpoints());
    let (listener, addr) = listener().await;
    lifecycle.ready();
    println!("\nlistens on {addr}");
    let drained = lifecycle.serve(listener, app).await;
    println!("\ncut {}", drained.cut_calls);
}

// ===== Its parent =====

struct Process {
    child: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Process {
    async fn start(test: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("health_signals::{test}"), "--nocapture"])
            .env(CHILD, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut started = Self { child, stdin, lines };
        started.says("armed").await;
        started
    }

    /// What comes after this on a line of its own.
    async fn says(&mut self, what: &str) -> String {
        loop {
            let line = soon(self.lines.next_line()).await.unwrap().expect("the child says more");
            if let Some(more) = line.strip_prefix(what) {
                return more.trim().to_owned();
            }
        }
    }

    async fn serves(&mut self) -> SocketAddr {
        self.stdin.write_all(b"serve\n").await.unwrap();
        self.says("listens on ").await.parse().unwrap()
    }

    async fn signal(&self, signal: &str) {
        let pid = self.child.id().unwrap().to_string();
        let sent = Command::new("kill").args([signal, &pid]).status();
        assert!(soon(sent).await.unwrap().success());
    }

    /// How many calls were cut.
    async fn ends(mut self) -> String {
        let cut = self.says("cut ").await;
        assert!(soon(self.child.wait()).await.unwrap().success());
        cut
    }
}

async fn until_ready_is(addr: SocketAddr, status: u16) {
    soon(async {
        loop {
            match ask(&http1(), addr, "/readyz").await {
                Ok((now, _)) if now == status => return,
                Ok(_) => {}
                Err(error) => panic!("gone before it was told to be: {error}"),
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_real_sigterm_drains_the_process() {
    if is_child() {
        return serve(Duration::from_millis(300), AGES).await;
    }
    let mut process = Process::start("a_real_sigterm_drains_the_process").await;
    let addr = process.serves().await;
    let slow = tokio::spawn(async move { ask(&http1(), addr, "/slow").await });
    while soon(ask(&http1(), addr, "/inside")).await.unwrap().1 != "2" {}
    process.signal("-TERM").await;
    // Not ready at once, and yet here.
    until_ready_is(addr, 503).await;
    assert_eq!(soon(slow).await.unwrap().unwrap(), (StatusCode::OK, "done".into()));
    assert_eq!(process.ends().await, "0");
}

/// Armed by its constructor: what else would have killed it before it served.
#[tokio::test]
async fn a_signal_that_comes_while_it_starts_is_heard() {
    if is_child() {
        return serve(Duration::from_millis(500), AGES).await;
    }
    for signal in ["-TERM", "-INT"] {
        let mut process = Process::start("a_signal_that_comes_while_it_starts_is_heard").await;
        process.signal(signal).await;
        let addr = process.serves().await;
        // It says that it is ready, which is too late, and serves for what is left of the delay.
        assert_eq!(soon(ask(&http1(), addr, "/readyz")).await.unwrap().0, 503);
        assert_eq!(process.ends().await, "0");
    }
}

#[tokio::test]
async fn each_further_signal_ends_the_wait_that_is_on() {
    if is_child() {
        return serve(AGES, AGES).await;
    }
    let mut process = Process::start("each_further_signal_ends_the_wait_that_is_on").await;
    let addr = process.serves().await;
    let slow = tokio::spawn(async move { ask(&http1(), addr, "/slow").await });
    let deaf = tokio::spawn(async move { ask(&http1(), addr, "/deaf").await });
    while soon(ask(&http1(), addr, "/inside")).await.unwrap().1 != "3" {}
    process.signal("-TERM").await;
    until_ready_is(addr, 503).await;
    assert!(!slow.is_finished(), "the delay is on");
    process.signal("-TERM").await;
    assert_eq!(soon(slow).await.unwrap().unwrap().1, "done");
    assert!(!deaf.is_finished());
    process.signal("-INT").await;
    assert!(soon(deaf).await.unwrap().is_err());
    assert_eq!(process.ends().await, "1");
}

/// As Kubernetes does it, if a `preStop` hook asks the process to drain.
#[tokio::test]
async fn a_drain_by_hand_and_the_signal_that_follows_are_one() {
    if is_child() {
        return serve(AGES, AGES).await;
    }
    let mut process = Process::start("a_drain_by_hand_and_the_signal_that_follows_are_one").await;
    let addr = process.serves().await;
    let slow = tokio::spawn(async move { ask(&http1(), addr, "/slow").await });
    let deaf = tokio::spawn(async move { ask(&http1(), addr, "/deaf").await });
    while soon(ask(&http1(), addr, "/inside")).await.unwrap().1 != "3" {}
    // At least once, says Kubernetes.
    for _ in 0..2 {
        assert_eq!(soon(ask(&http1(), addr, "/hook")).await.unwrap().0, 200);
    }
    // Of these two only the second is in a hurry.
    process.signal("-TERM").await;
    process.signal("-INT").await;
    assert_eq!(soon(slow).await.unwrap().unwrap().1, "done");
    // That was the end of the delay, and not of all.
    process.signal("-TERM").await;
    assert!(soon(deaf).await.unwrap().is_err());
    assert_eq!(process.ends().await, "1");
}
