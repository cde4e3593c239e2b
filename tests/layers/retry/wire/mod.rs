//! Errors of the real hyper and h2, over pipes in memory.

mod h1;
mod h2;

use std::{
    io::{self, ErrorKind},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
};

use buttress::{Backoff, RetryBudget, RetryLayer};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::io::{DuplexStream, duplex};
use tower::{Service, service_fn};

use crate::support::{ms, pipe::Pipe};

/// Counts the connections and the requests.
#[derive(Clone, Debug, Default)]
struct AttemptContext(Arc<(AtomicU32, AtomicU32)>);

impl AttemptContext {
    fn connections(&self) -> u32 {
        self.0.0.load(SeqCst)
    }

    fn requests(&self) -> u32 {
        self.0.1.load(SeqCst)
    }

    fn request(&self) {
        self.0.1.fetch_add(1, SeqCst);
    }
}

/// Returns a connector. `server` serves each connection, by its number. `None` refuses the connection.
fn connector<F>(
    seen: &AttemptContext,
    server: impl Fn(u32, DuplexStream, AttemptContext) -> Option<F> + Clone + Send + Sync + 'static,
) -> impl Service<
    http::Uri,
    Response = Pipe,
    Error = io::Error,
    Future = std::future::Ready<io::Result<Pipe>>,
> + Clone
+ Send
+ Sync
+ 'static
where
    F: Future<Output = ()> + Send + 'static,
{
    let seen = seen.clone();
    service_fn(move |_: http::Uri| {
        let n = seen.0.0.fetch_add(1, SeqCst) + 1;
        let (ours, theirs) = duplex(64 * 1024);
        std::future::ready(match server(n, theirs, seen.clone()) {
            Some(serving) => {
                tokio::spawn(serving);
                Ok(Pipe::new(ours))
            }
            None => Err(ErrorKind::ConnectionRefused.into()),
        })
    })
}

fn client() -> hyper_util::client::legacy::Builder {
    let mut builder = Client::builder(TokioExecutor::new());
    // Otherwise hyper repeats requests that the retry layer should repeat.
    builder.retry_canceled_requests(false);
    builder
}

fn layer(budget: &RetryBudget) -> RetryLayer {
    RetryLayer::http().backoff(Backoff::constant(ms(5)).without_jitter()).budget(budget.clone())
}

fn request(method: Method, body: &'static str) -> Request<Full<Bytes>> {
    Request::builder().method(method).uri("http://pipe/").body(Full::from(body)).unwrap()
}
