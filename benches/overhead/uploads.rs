//! A typical request of a client, with headers and a body, through a retry.

use std::{
    convert::Infallible,
    future::{Future, Ready, ready},
    hint::black_box,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use buttress::RetryLayer;
use bytes::Bytes;
use http::{HeaderValue, Request, Response, header};
use http_body::Body;
use http_body_util::{Empty, Full};
use tower::{
    Layer, Service,
    retry::{
        Policy,
        budget::{Budget, TpsBudget},
    },
};

use crate::calls::Made;

type Call = Request<Full<Bytes>>;
type Answer = Response<Empty<Bytes>>;

/// Reads the request to its end, like a client, and responds.
#[derive(Clone)]
struct Reads;

impl<B: Body> Service<Request<B>> for Reads {
    type Response = Answer;
    type Error = Infallible;
    type Future = Ready<Result<Answer, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let mut cx = Context::from_waker(Waker::noop());
        let (head, body) = request.into_parts();
        black_box(head.headers.len());
        let mut body = pin!(body);
        while let Poll::Ready(Some(Ok(frame))) = body.as_mut().poll_frame(&mut cx) {
            black_box(frame.is_data());
        }
        ready(Ok(Response::new(Empty::new())))
    }
}

/// The policy from the documentation of tower.
#[derive(Clone, Default)]
struct Budgeted(Arc<TpsBudget>);

impl Policy<Call, Answer, Infallible> for Budgeted {
    type Future = Ready<()>;

    fn retry(
        &mut self,
        _: &mut Call,
        result: &mut Result<Answer, Infallible>,
    ) -> Option<Ready<()>> {
        match result {
            Ok(answer) if answer.status().is_server_error() => self.0.withdraw().then(|| ready(())),
            _ => {
                self.0.deposit();
                None
            }
        }
    }

    fn clone_request(&mut self, request: &Call) -> Option<Call> {
        Some(request.clone())
    }
}

fn request(body: &Bytes, id: u64) -> Call {
    let mut request = Request::new(Full::new(body.clone()));
    *request.method_mut() = http::Method::PUT;
    let headers = request.headers_mut();
    headers.insert(header::HOST, HeaderValue::from_static("orders.example.com"));
    headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::USER_AGENT, HeaderValue::from_static("orders/1.0"));
    // Most requests have one or two headers of their own.
    headers.insert("x-request-id", HeaderValue::from(id));
    request
}

fn made<S>(mut service: S) -> Made
where
    S: Service<Call, Response: 'static> + Send + 'static,
{
    let body = Bytes::from(vec![b'x'; 1024]);
    Made {
        sizes: Some((size_of::<S>(), size_of::<S::Future>())),
        clone: None,
        run: Box::new(move |calls| {
            let mut cx = Context::from_waker(Waker::noop());
            for id in 0..calls {
                while service.poll_ready(&mut cx).is_pending() {}
                let future = pin!(service.call(request(&body, id)));
                black_box(future.poll(&mut cx).is_ready());
            }
        }),
    }
}

pub fn bare() -> Made {
    made(Reads)
}

pub fn tower() -> Made {
    made(tower::retry::Retry::new(Budgeted::default(), Reads))
}

pub fn ours() -> Made {
    made(RetryLayer::http().layer(Reads))
}
