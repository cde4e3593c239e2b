//! 200 callers through at most 50 connections, beside the same callers without a cap, in turn.
//!
//! ```text
//! cargo run --release --all-features --example connection_cap
//! ```
//!
//! Each pair of runs is one without a cap (hyper-util's client as it is) and one with; which comes first changes. Once
//! the upstream answers at once: then all that is measured is what a call costs, and three callers in four wait in a line, which
//! the bare client spares them. Once each answer takes it some work, as answers do: there the cap is held to its word. It
//! ends by itself, after some 20 s.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
        mpsc,
    },
    thread,
    time::Duration,
};

use buttress::{
    BoxError,
    connect::{Client, ConnectHandle, ConnectLayer},
};
use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::{BodyExt, Empty, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    client::legacy,
    rt::{TokioExecutor, TokioIo},
};
use tokio::{net::TcpListener, time::Instant};
use tower::{Service, ServiceExt};

const CALLERS: usize = 200;
const CAP: usize = 50;
const PAIRS: usize = 30;
const RUN: Duration = Duration::from_millis(200);
/// Of the upstream's one processor, for each answer.
const WORK: Duration = Duration::from_micros(100);

fn main() -> Result<(), BoxError> {
    // One for each client, so that each can tell how many connections it saw.
    let (open, bounded) = (Upstream::start(), Upstream::start());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        // It ends by itself, whatever goes wrong.
        tokio::time::timeout(Duration::from_secs(60), compare(&open, &bounded)).await?
    })
}

async fn compare(open: &Upstream, bounded: &Upstream) -> Result<(), BoxError> {
    let uncapped = legacy::Client::builder(TokioExecutor::new()).build_http();
    let layer = ConnectLayer::new().max_per_host(CAP);
    let handle = layer.handle();
    let capped = Client::builder(layer).build_http();

    println!("{CALLERS} callers, {PAIRS} pairs of runs of {RUN:?} each; requests a second:");
    // Neither is to pay for what is done once.
    run(&uncapped, open.addr, "").await?;
    run(&capped, bounded.addr, "").await?;
    let (mut ratio, mut error) = (0.0, 0.0);
    for (path, what) in
        [("", "answers at once".to_owned()), ("work", format!("works for {WORK:?}"))]
    {
        println!("an upstream that {what}:");
        println!("{:>12} {:>12} {:>8}", "no cap", format!("cap {CAP}"), "ratio");
        let mut ratios = Vec::new();
        for pair in 0..PAIRS {
            let (without, with);
            if pair % 2 == 0 {
                without = run(&uncapped, open.addr, path).await?;
                with = run(&capped, bounded.addr, path).await?;
            } else {
                with = run(&capped, bounded.addr, path).await?;
                without = run(&uncapped, open.addr, path).await?;
            }
            ratios.push(with / without);
            println!("{without:>12.0} {with:>12.0} {:>8.3}", with / without);
        }
        (ratio, error) = mean(&ratios);
        println!("mean ratio {ratio:.3}, give or take {error:.3}");
    }
    let most = bounded.most.load(SeqCst);
    summary(&handle, most, open.most.load(SeqCst));

    check(most <= CAP, "never more than the cap")?;
    check(handle.snapshot().saturated == 0, "nobody was refused")?;
    // What else this machine does falls on one of the two by chance.
    check(ratio + 2.0 * error >= 0.95, "within 5 % of no cap at all, where answers take work")
}

/// The geometric mean of ratios, and its standard error.
fn mean(ratios: &[f64]) -> (f64, f64) {
    let n = ratios.len() as f64;
    let mean = ratios.iter().map(|ratio| ratio.ln()).sum::<f64>() / n;
    let spread = ratios.iter().map(|ratio| (ratio.ln() - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean.exp(), mean.exp() * (spread / n).sqrt())
}

fn summary(handle: &ConnectHandle, most: usize, uncapped: usize) {
    let seen = handle.snapshot();
    let calls = seen.created + seen.reused;
    println!(
        "connections open at once: {uncapped} without a cap; {most} with, and {} made",
        seen.created
    );
    println!("reused by {:.2} % of {calls} calls", 100.0 * seen.reused as f64 / calls as f64);
    let each = seen.waited.checked_div(u32::try_from(seen.waits).unwrap_or(u32::MAX));
    println!(
        "{} waited for a connection, {:.1?} each; {} refused",
        seen.waits,
        each.unwrap_or_default(),
        seen.saturated
    );
}

/// Requests a second.
async fn run<S, B>(client: &S, addr: SocketAddr, path: &str) -> Result<f64, BoxError>
where
    S: Service<Request<Empty<Bytes>>, Response = Response<B>> + Clone + Send + Sync + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    B: http_body::Body<Data: Send, Error: Into<BoxError>> + Send,
{
    let uri: Uri = format!("http://{addr}/{path}").parse()?;
    let (start, done) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..CALLERS {
        let (client, uri, done) = (client.clone(), uri.clone(), done.clone());
        callers.spawn(async move {
            while start.elapsed() < RUN {
                let request = Request::get(uri.clone()).body(Empty::new())?;
                let response = client.clone().oneshot(request).await.map_err(Into::into)?;
                response.into_body().collect().await.map_err(Into::into)?;
                done.fetch_add(1, SeqCst);
            }
            Ok::<_, BoxError>(())
        });
    }
    while let Some(caller) = callers.join_next().await {
        caller??;
    }
    Ok(done.load(SeqCst) as f64 / start.elapsed().as_secs_f64())
}

// ===== The upstream =====

/// On a thread of its own. Knows how many connections it has had open at most.
struct Upstream {
    addr: SocketAddr,
    most: Arc<AtomicUsize>,
}

impl Upstream {
    fn start() -> Self {
        let (tell, told) = mpsc::channel();
        let most = Arc::new(AtomicUsize::new(0));
        let seen = most.clone();
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").await?;
                let _ = tell.send(listener.local_addr()?);
                serve(listener, &seen).await
            })
        });
        let addr = told.recv().expect("the upstream listens");
        Self { addr, most }
    }
}

async fn serve(listener: TcpListener, most: &AtomicUsize) -> std::io::Result<()> {
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let (tcp, _) = listener.accept().await?;
        tcp.set_nodelay(true)?;
        most.fetch_max(open.fetch_add(1, SeqCst) + 1, SeqCst);
        let open = open.clone();
        tokio::spawn(async move {
            let hello = service_fn(|request: Request<Incoming>| async move {
                let start = Instant::now();
                while request.uri().path() == "/work" && start.elapsed() < WORK {
                    std::hint::spin_loop();
                }
                Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"hello"))))
            });
            let _ = http1::Builder::new().serve_connection(TokioIo::new(tcp), hello).await;
            open.fetch_sub(1, SeqCst);
        });
    }
}

fn check(holds: bool, what: &str) -> Result<(), BoxError> {
    if holds { Ok(()) } else { Err(format!("does not hold: {what}").into()) }
}
