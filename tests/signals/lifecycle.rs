//! Real signals. Each test runs itself again in a child process, which serves and receives the signals.

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

use crate::support::net::{ask, client as http1, listener, soon};

// ===== The child =====

const CHILD: &str = "BUTTRESS_TEST_CHILD";
/// Longer than any test.
const AGES: Duration = Duration::from_secs(600);

fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Waits for a line on the standard input, then serves. Prints each report on a line of its own.
async fn serve(delay: Duration, longest: Duration) {
    let health = Health::new();
    let lifecycle = Lifecycle::new(&health).unwrap().drain_delay(delay).drain_timeout(longest);
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

// ===== The parent =====

struct Process {
    child: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Process {
    async fn start(test: &str) -> Self {
        let (_binary, module) = module_path!().split_once("::").unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("{module}::{test}"), "--nocapture"])
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

    /// Waits for a line with this prefix. Returns the rest of the line.
    async fn says(&mut self, what: &str) -> String {
        loop {
            let line = soon(self.lines.next_line()).await.unwrap().expect("the child ended early");
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

    /// Waits for the end of the process. Returns the number of calls that were cut.
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
                Err(error) => panic!("the server ended early: {error}"),
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
    // The process is not ready at once, but still serves.
    until_ready_is(addr, 503).await;
    assert_eq!(soon(slow).await.unwrap().unwrap(), (StatusCode::OK, "done".into()));
    assert_eq!(process.ends().await, "0");
}

/// The constructor installs the signal handlers. Without them the signal would kill the process before it serves.
#[tokio::test]
async fn a_signal_during_the_start_is_handled() {
    if is_child() {
        return serve(Duration::from_millis(500), AGES).await;
    }
    for signal in ["-TERM", "-INT"] {
        let mut process = Process::start("a_signal_during_the_start_is_handled").await;
        process.signal(signal).await;
        let addr = process.serves().await;
        // `ready` comes after the signal, so the process does not become ready. It serves for the rest of the delay.
        assert_eq!(soon(ask(&http1(), addr, "/readyz")).await.unwrap().0, 503);
        assert_eq!(process.ends().await, "0");
    }
}

#[tokio::test]
async fn each_further_signal_ends_the_current_phase() {
    if is_child() {
        return serve(AGES, AGES).await;
    }
    let mut process = Process::start("each_further_signal_ends_the_current_phase").await;
    let addr = process.serves().await;
    let slow = tokio::spawn(async move { ask(&http1(), addr, "/slow").await });
    let deaf = tokio::spawn(async move { ask(&http1(), addr, "/deaf").await });
    while soon(ask(&http1(), addr, "/inside")).await.unwrap().1 != "3" {}
    process.signal("-TERM").await;
    until_ready_is(addr, 503).await;
    assert!(!slow.is_finished(), "the delay has ended");
    process.signal("-TERM").await;
    assert_eq!(soon(slow).await.unwrap().unwrap().1, "done");
    assert!(!deaf.is_finished());
    process.signal("-INT").await;
    assert!(soon(deaf).await.unwrap().is_err());
    assert_eq!(process.ends().await, "1");
}

/// As Kubernetes does, with a `preStop` hook that asks the process to drain.
#[tokio::test]
async fn a_signal_after_a_drain_by_a_hook_does_not_skip_the_delay() {
    if is_child() {
        return serve(AGES, AGES).await;
    }
    let mut process =
        Process::start("a_signal_after_a_drain_by_a_hook_does_not_skip_the_delay").await;
    let addr = process.serves().await;
    let slow = tokio::spawn(async move { ask(&http1(), addr, "/slow").await });
    let deaf = tokio::spawn(async move { ask(&http1(), addr, "/deaf").await });
    while soon(ask(&http1(), addr, "/inside")).await.unwrap().1 != "3" {}
    // Kubernetes calls a hook at least once, possibly twice.
    for _ in 0..2 {
        assert_eq!(soon(ask(&http1(), addr, "/hook")).await.unwrap().0, 200);
    }
    // The first signal after the hook only confirms the drain. The second one ends the delay.
    process.signal("-TERM").await;
    process.signal("-INT").await;
    assert_eq!(soon(slow).await.unwrap().unwrap().1, "done");
    // The third signal ends the time for the remaining calls.
    process.signal("-TERM").await;
    assert!(soon(deaf).await.unwrap().is_err());
    assert_eq!(process.ends().await, "1");
}
