//! Requests in lanes through the retry layer over hyper-util's client, and the result of each request.

use std::{
    cell::{Cell, RefCell},
    fmt::Debug,
    future::Future,
    time::Duration,
};

use buttress::{
    BoxError, RetryLayer,
    retry::{Attempts, ReplayBody, Retry},
};
use bytes::Bytes;
use futures_util::future::join_all;
use http::{Method, Request, Response};
use http_body::Body;
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tower::{Layer, Service, ServiceExt};

/// Number of lanes. Each lane sends one request after another.
pub const LANES: usize = 32;

type Hyper = Client<HttpConnector, ReplayBody<Full<Bytes>>>;

pub struct Clients<S = Retry<Hyper>> {
    service: S,
    port: u16,
    sent: Cell<usize>,
    endings: RefCell<Vec<Ending>>,
}

/// The result of a request.
#[derive(Clone, Debug)]
pub struct Ending {
    pub id: String,
    pub method: &'static str,
    pub status: Option<u16>,
    pub made: u32,
    error: Option<String>,
}

impl Clients {
    pub fn new(port: u16) -> Self {
        let hyper = Client::builder(TokioExecutor::new()).build_http();
        Self::over(RetryLayer::http().layer(hyper), port)
    }
}

impl<S> Clients<S> {
    pub fn over(service: S, port: u16) -> Self {
        Self { service, port, sent: Cell::new(0), endings: RefCell::default() }
    }

    pub fn endings(&self) -> Vec<Ending> {
        self.endings.borrow().clone()
    }
}

impl<S, B> Clients<S>
where
    S: Service<Request<Full<Bytes>>, Response = Response<B>, Error = BoxError> + Clone,
    B: Body<Error: Debug>,
{
    async fn send(&self, method: Method, path: &str) {
        let n = self.sent.get();
        self.sent.set(n + 1);
        let body = if method == Method::GET { Bytes::new() } else { Bytes::from("order") };
        let name = match method {
            Method::GET => "GET",
            Method::PUT => "PUT",
            _ => "POST",
        };
        let id = format!("{name}-{n}");
        let request = Request::builder()
            .method(method)
            .uri(format!("http://127.0.0.1:{}{path}", self.port))
            .header("x-id", &id)
            .body(Full::new(body))
            .unwrap();
        let mut ending = Ending { id, method: name, status: None, made: 1, error: None };
        match self.service.clone().oneshot(request).await {
            Ok(response) => {
                ending.made = Attempts::of(&response).made;
                let status = response.status().as_u16();
                // The body is read to its end, so that the connection returns to the pool.
                match response.into_body().collect().await {
                    Ok(_) => ending.status = Some(status),
                    Err(error) => ending.error = Some(format!("{error:?}")),
                }
            }
            Err(error) => {
                ending.made = Attempts::find(&*error).unwrap().made;
                ending.error = Some(format!("{error:?}"));
            }
        }
        self.endings.borrow_mut().push(ending);
    }

    async fn get(&self) {
        self.send(Method::GET, "/").await;
    }

    /// Sends this many `GET`s in lanes, and a `POST` after every tenth of them. The upstream cuts off one `POST` in
    /// ten.
    pub async fn round(&self, gets: usize) {
        let left = Cell::new(gets);
        let lane = || async {
            while left.get() > 0 {
                let n = left.get() - 1;
                left.set(n);
                self.get().await;
                match n {
                    n if n % 100 == 0 => self.send(Method::POST, "/cut").await,
                    n if n % 10 == 0 => self.send(Method::POST, "/").await,
                    _ => {}
                }
            }
        };
        join_all((0..LANES).map(|_| lane())).await;
        // The upstream cuts off every attempt of this request, so its log has to contain several of them. This proves
        // that the log reveals a request that is sent repeatedly.
        self.send(Method::PUT, "/cut").await;
    }

    /// Each lane sends a request, pauses for about `time`, and sends another one. Some of the later requests are sent
    /// just before the upstream closes their connection, some just after, and some at the same moment.
    pub async fn after_silences(&self, time: Duration) {
        let lane = |n: usize| async move {
            self.get().await;
            let early = Duration::from_millis(16);
            tokio::time::sleep(time - early + Duration::from_millis(n as u64)).await;
            match n % 4 {
                0 => self.send(Method::POST, "/").await,
                _ => self.get().await,
            }
        };
        join_all((0..LANES).map(lane)).await;
    }

    /// Fills the pool with idle connections.
    pub async fn fill_pool(&self) {
        join_all((0..LANES).map(|_| self.get())).await;
        // Tasks of hyper-util return the connections to the pool.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    /// Sends as many requests at once as the pool has connections. Every fourth one is a `POST`.
    pub fn burst(&self) -> impl Future<Output = ()> + '_ {
        let one = |n: usize| async move {
            match n % 4 {
                0 => self.send(Method::POST, "/").await,
                _ => self.get().await,
            }
        };
        let all = join_all((0..LANES).map(one));
        async {
            all.await;
        }
    }
}
