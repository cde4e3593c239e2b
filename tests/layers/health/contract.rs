//! The test list for every layer, for the layers of `health` and `lifecycle`.

use std::{future::Future, pin::Pin, task::Poll, time::Duration};

use buttress::{
    BoxError, Health, HealthProbe, HealthProbeLayer, Lifecycle, Rejected,
    health::{FnProbe, HealthEndpointsLayer, HealthProbeHandle, ProbeState},
    lifecycle::LifecycleLayer,
    permit::TrackedBody,
};
use http::{Request, Response};
use tower::{Layer, Service};

use crate::support::{ScriptBody, Strict, contract::Subject};

type Answer = Response<TrackedBody<ScriptBody>>;

/// Turns the rejections that a layer sends as responses into errors, which the test list expects.
#[derive(Clone)]
struct AsErrors<T>(T);

impl<L: Layer<Strict>> Layer<Strict> for AsErrors<L> {
    type Service = AsErrors<L::Service>;

    fn layer(&self, inner: Strict) -> Self::Service {
        AsErrors(self.0.layer(inner))
    }
}

impl<S> Service<Request<()>> for AsErrors<S>
where
    S: Service<Request<()>, Response = Answer, Error: Into<BoxError>, Future: Send + 'static>,
{
    type Response = Answer;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Answer, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> Poll<Result<(), BoxError>> {
        self.0.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<()>) -> Self::Future {
        let answer = self.0.call(request);
        Box::pin(async move {
            let answer = answer.await.map_err(Into::into)?;
            match answer.extensions().get::<Rejected>() {
                None => Ok(answer),
                Some(refused) => Err(refused.clone().into()),
            }
        })
    }
}

mod lifecycle {
    use super::*;
    use crate::support::contract::contract_tests;

    /// A lifecycle in the phase *ready*.
    struct Ready {
        lifecycle: Lifecycle,
        layer: AsErrors<LifecycleLayer>,
    }

    impl Subject for Ready {
        type Layer = AsErrors<LifecycleLayer>;
        type Service = AsErrors<buttress::lifecycle::LifecycleService<Strict>>;

        const EXCLUSIVE: bool = false;

        async fn new() -> Self {
            let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
            let lifecycle = lifecycle.drain_delay(Duration::ZERO).grace(Duration::ZERO);
            lifecycle.ready();
            Self { layer: AsErrors(lifecycle.layer()), lifecycle }
        }

        fn layer(&self) -> &Self::Layer {
            &self.layer
        }

        fn taken(&self) -> usize {
            self.lifecycle.in_flight()
        }

        fn shut(&mut self) {
            self.lifecycle.drain();
        }

        fn unshut(&mut self) {
            unreachable!("the drain of a process cannot be revoked");
        }
    }

    contract_tests!(Ready, which refuses for ever);
}

mod probe {
    use super::*;
    use crate::support::contract::contract_tests;

    type Asks = FnProbe<fn() -> std::future::Ready<Result<(), &'static str>>>;

    /// A probe layer in the state *down*, which rejects calls only after `shut`. Its calls hold no permit.
    struct Down(HealthProbeLayer<Asks>, HealthProbeHandle);

    impl Subject for Down {
        type Layer = HealthProbeLayer<Asks>;
        type Service = HealthProbe<Strict>;

        const EXCLUSIVE: bool = false;

        async fn new() -> Self {
            let fails: fn() -> _ = || std::future::ready(Err("scripted failure"));
            let layer = HealthProbeLayer::check(fails).thresholds(1, 1).passive();
            let handle = layer.handle();
            drop(layer.layer(Strict::new().0));
            assert_eq!(handle.changed().await, ProbeState::Down);
            handle.set_shadow(true);
            Self(layer, handle)
        }

        fn layer(&self) -> &Self::Layer {
            &self.0
        }

        fn taken(&self) -> usize {
            0
        }

        fn shut(&mut self) {
            self.1.set_shadow(false);
        }

        fn unshut(&mut self) {
            self.1.set_shadow(true);
        }
    }

    contract_tests!(Down:
        passes_through,
        clone_resets_readiness,
        ready_is_sticky,
        ready_is_sticky_when_the_answer_will_be_no,
        no_call_without_ready,
        service_drop_releases,
        inner_panic_releases,
        empty_body_releases_at_head,
        trailers_and_size_hint_forwarded,
        inner_poll_ready_error_propagates,
        refusing_never_polls_inner,
        rejected_while_inner_reserved_releases,
        auto_traits,
        works_inside_tokio_spawn,
    );
}

mod endpoints {
    use super::*;
    use crate::support::contract::contract_tests;

    /// Endpoints, which reject no call, hold no permit, and are ready even if the inner service is not.
    struct InFront(AsErrors<HealthEndpointsLayer>);

    impl Subject for InFront {
        type Layer = AsErrors<HealthEndpointsLayer>;
        type Service = AsErrors<buttress::health::HealthEndpoints<Strict>>;

        const EXCLUSIVE: bool = false;

        async fn new() -> Self {
            Self(AsErrors(Health::new().endpoints()))
        }

        fn layer(&self) -> &Self::Layer {
            &self.0
        }

        fn taken(&self) -> usize {
            0
        }

        fn shut(&mut self) {
            unreachable!("the endpoints reject no call");
        }

        fn unshut(&mut self) {
            unreachable!("the endpoints reject no call");
        }
    }

    contract_tests!(InFront:
        passes_through,
        ready_is_sticky,
        service_drop_releases,
        inner_panic_releases,
        empty_body_releases_at_head,
        trailers_and_size_hint_forwarded,
        inner_poll_ready_error_propagates,
        auto_traits,
        works_inside_tokio_spawn,
    );
}
