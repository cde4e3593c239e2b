//! The test list for every layer, as functions over a [`Subject`]. [`contract_tests!`] makes them the tests of a file.

use std::{error::Error, future::Future};

use buttress::{BoxError, permit::TrackedBody};
use http::{Request, Response};
use http_body::Body;
use tokio_test::{assert_pending, assert_ready, assert_ready_err, assert_ready_ok, task};
use tower::{Layer, Service, ServiceExt, util::BoxCloneSyncService};
use tower_test::mock::Spawn;

use super::{
    Oops, Piece, ScriptBody, Strict, Then, Watch, empty, hello, is_refusal, read, request, trailers,
};

/// A layer under test, in a state in which it admits the next call.
pub trait Subject: Sized {
    type Layer: Layer<Strict, Service = Self::Service> + Clone + Send + Sync + 'static;
    type Service: Service<
            Request<()>,
            Response = Response<TrackedBody<ScriptBody>>,
            Error = BoxError,
            Future: Send + 'static,
        > + Clone
        + Send
        + Sync
        + 'static;

    /// Whether the layer rejects a second call while the first one is in flight. `false` for a layer that rejects calls
    /// for other reasons only.
    const EXCLUSIVE: bool = true;

    async fn new() -> Self;

    fn layer(&self) -> &Self::Layer;

    /// Returns the number of permits and probe slots that calls hold.
    fn taken(&self) -> usize;

    /// Makes the layer reject calls.
    fn shut(&mut self);

    /// Makes the layer admit calls again.
    fn unshut(&mut self);
}

macro_rules! contract_tests {
    ($Subject:ty: $($name:ident),* $(,)?) => {$(
        #[tokio::test(start_paused = true)]
        async fn $name() {
            $crate::support::contract::$name::<$Subject>().await;
        }
    )*};
    ($Subject:ty) => {
        contract_tests!($Subject: ready_is_sticky_when_the_answer_will_be_no);
        contract_tests!($Subject, which refuses for ever);
    };
    ($Subject:ty, which refuses for ever) => {
        contract_tests!($Subject:
            passes_through,
            clone_resets_readiness,
            ready_is_sticky,
            no_call_without_ready,
            service_drop_releases,
            unpolled_future_drop_releases,
            pending_future_drop_releases,
            waiting_for_inner_drop_releases,
            inner_panic_releases,
            body_end_releases,
            body_error_releases,
            body_drop_releases,
            empty_body_releases_at_head,
            trailers_and_size_hint_forwarded,
            inner_poll_ready_error_propagates,
            inner_poll_ready_error_releases,
            refusing_never_polls_inner,
            rejected_while_inner_reserved_releases,
            state_shared_across_layer_calls,
            auto_traits,
            works_inside_tokio_spawn,
        );
    };
}
pub(crate) use contract_tests;

type Answer = Result<Response<TrackedBody<ScriptBody>>, BoxError>;

async fn begin<T: Subject>((inner, watch): (Strict, Watch)) -> (T, Spawn<T::Service>, Watch) {
    let subject = T::new().await;
    let service = Spawn::new(subject.layer().layer(inner));
    (subject, service, watch)
}

fn oops(error: &BoxError) -> bool {
    error.downcast_ref::<Oops>().is_some()
}

#[track_caller]
fn assert_refused(answer: Answer) {
    match answer {
        Ok(_) => panic!("the call was not rejected"),
        Err(error) => assert!(is_refusal(&*error), "{error}"),
    }
}

// ===== Pass-through and readiness =====

pub async fn passes_through<T: Subject>() {
    let (subject, mut service, watch) = begin::<T>(Strict::new()).await;
    assert_ready_ok!(service.poll_ready());
    let response = service.call(request()).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(read(response.into_body()).await.unwrap().0, b"hello");
    assert_eq!(subject.taken(), 0);

    watch.script([Then::Fail(Oops("of its own"))]);
    assert_ready_ok!(service.poll_ready());
    let error = service.call(request()).await.unwrap_err();
    assert_eq!(error.downcast_ref(), Some(&Oops("of its own")), "the inner error is not wrapped");
    assert_eq!((watch.seen().calls, watch.seen().without_ready), (2, 0));
}

pub async fn clone_resets_readiness<T: Subject>() {
    let (_subject, mut service, watch) = begin::<T>(Strict::new()).await;
    assert_ready_ok!(service.poll_ready());
    watch.set_ready(false);
    let mut clone = service.clone();
    assert_pending!(clone.poll_ready(), "a clone starts without readiness");
    assert_eq!(watch.seen().reserved, 1);
    watch.set_ready(true);
    assert!(clone.is_woken());
    assert_ready_ok!(clone.poll_ready());
    clone.call(request()).await.unwrap();
    assert_eq!(watch.seen().without_ready, 0);
}

pub async fn ready_is_sticky<T: Subject>() {
    let (_subject, mut service, watch) = begin::<T>(Strict::new()).await;
    assert_ready_ok!(service.poll_ready());
    watch.set_ready(false);
    assert_ready_ok!(service.poll_ready());
    assert_ready_ok!(service.poll_ready());
    assert_eq!(watch.seen().reserved, 1);
    let mut future = task::spawn(service.call(request()));
    assert_ready_ok!(future.poll());
}

pub async fn ready_is_sticky_when_the_answer_will_be_no<T: Subject>() {
    let (mut subject, mut service, watch) = begin::<T>(Strict::new()).await;
    watch.set_ready(false);
    subject.shut();
    assert_ready_ok!(service.poll_ready());
    subject.unshut();
    assert_ready_ok!(service.poll_ready());
    // The next call waits for the inner service and succeeds.
    let mut future = task::spawn(service.call(request()));
    assert_pending!(future.poll());
    watch.set_ready(true);
    assert!(future.is_woken());
    assert_ready_ok!(future.poll());
}

pub async fn no_call_without_ready<T: Subject>() {
    // A call without `poll_ready`.
    let (subject, mut service, watch) = begin::<T>(Strict::new()).await;
    watch.set_ready(false);
    let mut future = task::spawn(service.call(request()));
    assert_pending!(future.poll());
    assert_eq!(watch.seen().calls, 0);
    watch.set_ready(true);
    assert!(future.is_woken());
    let response = assert_ready_ok!(future.poll());
    read(response.into_body()).await.unwrap();
    assert_eq!(subject.taken(), 0);

    // A call after `poll_ready` has returned `Pending`.
    watch.set_ready(false);
    assert_pending!(service.poll_ready());
    watch.set_ready(true);
    service.call(request()).await.unwrap();

    // Two calls after one `poll_ready`.
    assert_ready_ok!(service.poll_ready());
    service.call(request()).await.unwrap();
    service.call(request()).await.unwrap();
    assert_eq!((watch.seen().calls, watch.seen().without_ready), (4, 0));
}

// ===== Release =====

pub async fn service_drop_releases<T: Subject>() {
    let (subject, mut service, watch) = begin::<T>(Strict::new()).await;
    assert_ready_ok!(service.poll_ready());
    assert_eq!((subject.taken(), watch.seen().reserved), (0, 1), "an idle handle holds no permit");
    drop(service);
    assert_eq!((subject.taken(), watch.seen().reserved), (0, 0));
}

pub async fn unpolled_future_drop_releases<T: Subject>() {
    for ready_first in [true, false] {
        let (subject, mut service, watch) = begin::<T>(Strict::holding()).await;
        if ready_first {
            assert_ready_ok!(service.poll_ready());
        }
        let future = service.call(request());
        assert_eq!(subject.taken(), 1);
        if T::EXCLUSIVE {
            assert_refused(service.clone().into_inner().oneshot(request()).await);
        }
        drop(future);
        assert_eq!((subject.taken(), watch.seen().in_flight, watch.seen().reserved), (0, 0, 0));
        assert_pending!(task::spawn(service.call(request())).poll(), "the next call is admitted");
    }
}

pub async fn pending_future_drop_releases<T: Subject>() {
    let (subject, mut service, watch) = begin::<T>(Strict::holding()).await;
    assert_ready_ok!(service.poll_ready());
    let mut future = task::spawn(service.call(request()));
    assert_pending!(future.poll());
    assert_eq!((subject.taken(), watch.seen().in_flight), (1, 1));
    drop(future);
    assert_eq!((subject.taken(), watch.seen().in_flight, watch.seen().cancelled), (0, 0, 1));
    assert_pending!(task::spawn(service.call(request())).poll(), "the next call is admitted");
}

pub async fn waiting_for_inner_drop_releases<T: Subject>() {
    let (subject, mut service, watch) = begin::<T>(Strict::new()).await;
    watch.set_ready(false);
    let mut future = task::spawn(service.call(request()));
    assert_pending!(future.poll());
    assert_eq!(subject.taken(), 1);
    drop(future);
    assert_eq!((subject.taken(), watch.seen().reserved), (0, 0));
}

pub async fn inner_panic_releases<T: Subject>() {
    for step in [Then::PanicInCall, Then::PanicInPoll] {
        let (subject, service, watch) = begin::<T>(Strict::new()).await;
        watch.script([step]);
        let task = tokio::spawn(service.into_inner().oneshot(request()));
        assert!(task.await.unwrap_err().is_panic());
        assert_eq!((subject.taken(), watch.seen().in_flight), (0, 0));
    }
    let (subject, service, watch) = begin::<T>(Strict::new()).await;
    watch.script([Then::Answer(Response::new(ScriptBody::new([Piece::Panic])))]);
    let response = service.into_inner().oneshot(request()).await.unwrap();
    let task = tokio::spawn(async move { read(response.into_body()).await.map(drop) });
    assert!(task.await.unwrap_err().is_panic());
    assert_eq!(subject.taken(), 0);
}

pub async fn body_end_releases<T: Subject>() {
    let two = || ScriptBody::new([Piece::data("a"), Piece::data("b")]);
    // A body that reports its end ends with its last frame, and any other body with `None`.
    for (body, frames) in [(two(), 2), (two().without_hints(), 3)] {
        let (subject, service, watch) = begin::<T>(Strict::new()).await;
        watch.script([Then::Answer(Response::new(body))]);
        let response = service.into_inner().oneshot(request()).await.unwrap();
        let mut body = task::spawn(response.into_body());
        for _ in 0..frames {
            assert_eq!(subject.taken(), 1);
            let _ = assert_ready!(body.enter(|cx, body| body.poll_frame(cx)));
        }
        assert_eq!(subject.taken(), 0, "the body has ended, although it is not dropped");
    }
    // Trailers end a body, too.
    let (subject, service, watch) = begin::<T>(Strict::new()).await;
    let body = ScriptBody::new([Piece::Trailers(trailers("0"))]).without_hints();
    watch.script([Then::Answer(Response::new(body))]);
    let mut body = task::spawn(service.into_inner().oneshot(request()).await.unwrap().into_body());
    let _ = assert_ready!(body.enter(|cx, body| body.poll_frame(cx)));
    assert_eq!(subject.taken(), 0);
}

pub async fn body_error_releases<T: Subject>() {
    let (subject, service, watch) = begin::<T>(Strict::new()).await;
    let body = ScriptBody::new([Piece::data("a"), Piece::Error, Piece::Stuck]);
    watch.script([Then::Answer(Response::new(body))]);
    let mut body = task::spawn(service.into_inner().oneshot(request()).await.unwrap().into_body());
    assert!(assert_ready!(body.enter(|cx, body| body.poll_frame(cx))).unwrap().is_ok());
    assert_eq!(subject.taken(), 1);
    let error = assert_ready!(body.enter(|cx, body| body.poll_frame(cx))).unwrap().unwrap_err();
    assert_eq!((error, subject.taken()), (Oops("body"), 0));
}

pub async fn body_drop_releases<T: Subject>() {
    let (subject, service, watch) = begin::<T>(Strict::new()).await;
    let body = ScriptBody::new([Piece::data("a"), Piece::Stuck]);
    watch.script([Then::Answer(Response::new(body))]);
    let mut body = task::spawn(service.into_inner().oneshot(request()).await.unwrap().into_body());
    assert!(assert_ready!(body.enter(|cx, body| body.poll_frame(cx))).unwrap().is_ok());
    assert_pending!(body.enter(|cx, body| body.poll_frame(cx)).map(drop));
    assert_eq!(subject.taken(), 1);
    drop(body);
    assert_eq!(subject.taken(), 0);
}

pub async fn empty_body_releases_at_head<T: Subject>() {
    let (subject, service, watch) = begin::<T>(Strict::new()).await;
    watch.script([Then::Answer(empty())]);
    let response = service.into_inner().oneshot(request()).await.unwrap();
    assert_eq!(subject.taken(), 0);
    assert!(response.body().is_end_stream());
}

pub async fn trailers_and_size_hint_forwarded<T: Subject>() {
    let (_subject, service, watch) = begin::<T>(Strict::new()).await;
    let pieces = [Piece::data("ab"), Piece::data("cde"), Piece::Trailers(trailers("7"))];
    watch.script([Then::Answer(Response::new(ScriptBody::new(pieces)))]);
    let body = service.into_inner().oneshot(request()).await.unwrap().into_body();
    assert_eq!(body.size_hint().exact(), Some(5), "a response of 5 bytes keeps its content-length");
    assert!(!body.is_end_stream());
    let (bytes, told) = read(body).await.unwrap();
    assert_eq!((bytes.as_slice(), told), (b"abcde".as_slice(), Some(trailers("7"))));
}

// ===== Errors and rejections =====

pub async fn inner_poll_ready_error_propagates<T: Subject>() {
    let (subject, mut service, watch) = begin::<T>(Strict::new()).await;
    watch.break_readiness();
    let error = assert_ready_err!(service.poll_ready());
    assert!(oops(&error), "the inner error is not wrapped");
    assert_eq!(subject.taken(), 0);
    // A call after the error does not reach the inner service.
    let error = service.call(request()).await.unwrap_err();
    assert!(oops(&error));
    assert_eq!((watch.seen().calls, subject.taken()), (0, 0));
}

/// The permit is released although the future that returned the error is not dropped.
pub async fn inner_poll_ready_error_releases<T: Subject>() {
    let (subject, mut service, watch) = begin::<T>(Strict::new()).await;
    watch.set_ready(false);
    let mut future = task::spawn(service.call(request()));
    assert_pending!(future.poll());
    assert_eq!(subject.taken(), 1);
    watch.break_readiness();
    assert!(oops(&assert_ready_err!(future.poll())));
    assert_eq!(subject.taken(), 0);
}

pub async fn refusing_never_polls_inner<T: Subject>() {
    let (mut subject, mut service, watch) = begin::<T>(Strict::new()).await;
    watch.set_ready(false);
    subject.shut();
    assert_ready_ok!(service.poll_ready());
    let mut future = task::spawn(service.call(request()));
    assert_refused(assert_ready!(future.poll()));
    assert_eq!((watch.seen().polls, watch.seen().calls), (0, 0));
}

pub async fn rejected_while_inner_reserved_releases<T: Subject>() {
    let (mut subject, mut service, watch) = begin::<T>(Strict::new()).await;
    assert_ready_ok!(service.poll_ready());
    assert_eq!(watch.seen().reserved, 1);
    subject.shut();
    let future = service.call(request());
    assert_eq!(watch.seen().reserved, 0, "the idle handle keeps no reservation");
    assert_refused(future.await);
}

// ===== Shared state, traits, tasks =====

pub async fn state_shared_across_layer_calls<T: Subject>() {
    let mut subject = T::new().await;
    let (one, watch) = Strict::holding();
    let (two, _) = Strict::holding();
    let (three, _) = Strict::holding();
    let mut under_way = task::spawn(subject.layer().layer(one).oneshot(request()));
    assert_pending!(under_way.poll());
    if !T::EXCLUSIVE {
        subject.shut();
    }
    // axum and tonic call `layer()` for each route, connection or request.
    assert_refused(subject.layer().layer(two).oneshot(request()).await);
    assert_refused(subject.layer().clone().layer(three).oneshot(request()).await);
    assert!(watch.end(0, Ok(empty())));
    assert_ready_ok!(under_way.poll());
    assert_eq!(subject.taken(), 0);
}

pub async fn auto_traits<T: Subject>() {
    fn layer<L: Clone + Send + Sync + 'static>(_: &L) {}
    fn service<S>(_: &S)
    where
        S: Service<Request<()>, Error: Into<BoxError>, Future: Send + 'static>,
        S: Clone + Send + Sync + 'static,
    {
    }
    fn body<B: Body + Send + Unpin + 'static>(_: &B) {}
    let (subject, wrapped, _) = begin::<T>(Strict::new()).await;
    layer(subject.layer());
    service(&wrapped.get_ref().clone());
    body(wrapped.into_inner().oneshot(request()).await.unwrap().body());
}

pub async fn works_inside_tokio_spawn<T: Subject>() {
    let (_subject, service, watch) = begin::<T>(Strict::new()).await;
    let service = service.into_inner();
    let oneshot = tokio::spawn(service.clone().oneshot(request()));
    read(oneshot.await.unwrap().unwrap().into_body()).await.unwrap();
    let mut boxed = BoxCloneSyncService::new(service);
    let task = tokio::spawn(async move { boxed.ready().await?.call(request()).await.map(drop) });
    task.await.unwrap().unwrap();
    assert_eq!((watch.seen().calls, watch.seen().without_ready), (2, 0));
}
