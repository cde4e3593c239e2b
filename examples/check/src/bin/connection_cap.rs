//! 200 callers that share at most 50 connections, compared with the same callers without a maximum.
//!
//! ```text
//! cargo run --release -p check-examples --bin connection_cap
//! ```
//!
//! Each pair of runs has one run with hyper-util's client alone and one with a maximum. The order alternates. In the
//! first series the upstream responds at once, so the runs measure the cost of a call. Three of four callers wait in
//! the queue for a connection. In the second series a response takes the upstream some work. The example asserts the
//! ratio of the second series. It ends after about 20 s.

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
/// The processor time of the upstream per response. The upstream has one thread.
const WORK: Duration = Duration::from_micros(100);

fn main() -> Result<(), BoxError> {
    // Each client has its own upstream, which counts the connections of this client.
    let (open, bounded) = (Upstream::start(), Upstream::start());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        // Ends the example also if a call hangs.
        tokio::time::timeout(Duration::from_secs(60), compare(&open, &bounded)).await?
    })
}

async fn compare(open: &Upstream, bounded: &Upstream) -> Result<(), BoxError> {
    let uncapped = legacy::Client::builder(TokioExecutor::new()).build_http();
    let layer = ConnectLayer::new().max_per_host(CAP);
    let handle = layer.handle();
    let capped = Client::builder(layer).build_http();

    println!("{CALLERS} callers, {PAIRS} pairs of runs of {RUN:?} each; requests per second:");
    // The first runs include one-time costs and are not measured.
    run(&uncapped, open.addr, "").await?;
    run(&capped, bounded.addr, "").await?;
    let (mut ratio, mut error) = (0.0, 0.0);
    for (path, what) in
        [("", "responds at once".to_owned()), ("work", format!("works for {WORK:?}"))]
    {
        println!("an upstream that {what}:");
        println!("{:>12} {:>12} {:>8}", "no max", format!("max {CAP}"), "ratio");
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
        println!("mean ratio {ratio:.3}, standard error {error:.3}");
    }
    let most = bounded.most.load(SeqCst);
    summary(&handle, most, open.most.load(SeqCst));

    check(most <= CAP, "never more connections than the maximum")?;
    check(handle.snapshot().saturated == 0, "no call was rejected")?;
    // Other load on the machine affects one of the two runs at random, hence the standard error.
    check(
        ratio + 2.0 * error >= 0.95,
        "within 5 % of the throughput without a maximum, if responses take work",
    )
}

/// Returns the geometric mean of the ratios, and its standard error.
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
        "connections open at once: {uncapped} without a maximum; {most} with, and {} opened",
        seen.created
    );
    println!("reused by {:.2} % of {calls} calls", 100.0 * seen.reused as f64 / calls as f64);
    let each = seen.waited.checked_div(u32::try_from(seen.waits).unwrap_or(u32::MAX));
    println!(
        "{} waited for a connection, {:.1?} each; {} rejected",
        seen.waits,
        each.unwrap_or_default(),
        seen.saturated
    );
}

/// Returns the requests per second.
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

// ===== Upstream =====

/// An upstream on its own thread. Counts the maximum number of open connections.
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
