//! Lanes of requests through the retry, over hyper-util's client, and how each of them ended.

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

/// How many requests are under way at once.
pub const LANES: usize = 32;

type Hyper = Client<HttpConnector, ReplayBody<Full<Bytes>>>;

pub struct Clients<S = Retry<Hyper>> {
    service: S,
    port: u16,
    sent: Cell<usize>,
    endings: RefCell<Vec<Ending>>,
}

/// How a request ended.
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
                // To its end, or its connection is not used again.
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

    /// So many `GET`s in lanes, and a `POST` for every ten of them, some of which are cut off.
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
        // What the witness has to see three times: it can tell.
        self.send(Method::PUT, "/cut").await;
    }

    /// Every lane asks, is silent for about `time`, and asks again: some just before the connection is
    /// closed, some just after, some in that very moment.
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

    /// Leaves a pool of idle connections behind.
    pub async fn fill_pool(&self) {
        join_all((0..LANES).map(|_| self.get())).await;
        // The connections go back to the pool by tasks of their own.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    /// As many requests as there are connections in the pool, at once: a `POST` among any four.
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
