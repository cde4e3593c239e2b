use super::service::Admission;
use crate::{error::ConfigError, fault::Fault};

/// The parts of an admission layer: its policy, the classification of calls, and the form of rejections.
#[derive(Clone)]
pub(crate) struct Plan<P, M, R> {
    pub(crate) policy: P,
    pub(crate) protocol: M,
    pub(crate) reject: R,
    pub(crate) fault: Fault,
}

impl<P, M, R> Plan<P, M, R> {
    /// Returns the value of a valid setting. Stores the error of the first setting that cannot work.
    pub(crate) fn accept<T>(&mut self, setting: Result<T, ConfigError>) -> Option<T> {
        self.fault.accept(setting)
    }

    pub(crate) fn with_protocol<N>(self, protocol: N) -> Plan<P, N, R> {
        Plan { policy: self.policy, protocol, reject: self.reject, fault: self.fault }
    }

    pub(crate) fn with_reject<N>(self, reject: N) -> Plan<P, M, N> {
        Plan { policy: self.policy, protocol: self.protocol, reject, fault: self.fault }
    }

    pub(crate) fn service<S>(&self, inner: S) -> Admission<S, P, M, R>
    where
        P: Clone,
        M: Clone,
        R: Clone,
    {
        Admission::new(
            inner,
            self.policy.clone(),
            self.protocol.clone(),
            self.reject.clone(),
            self.fault.label().cloned(),
        )
    }
}

/// Defines the public types of an admission layer: the layer, with the setters that all of them share, and those of
/// [`admission_service`].
///
/// | argument | meaning |
/// |---|---|
/// | `layer Name { field: G }` | the layer, with further fields. The type of each field is a type parameter of the layer |
/// | `service Name [K]` | the service. `K` are type parameters of the layer and the service, which `policy` may use |
/// | `future Name` | the future of a call |
/// | `policy Type` | the type that implements `Policy` |
/// | `where …` | the bounds under which it does so for the request type `Req`, one bound for each item |
macro_rules! admission_layer {
    (
        $(#[$layer_doc:meta])* layer $Layer:ident { $($field:ident: $G:ident),* }
        $(#[$service_doc:meta])* service $Service:ident [$($K:ident),*]
        future $Future:ident
        policy $Policy:ty
        $(where $($bounds:tt)+)?
    ) => {
        $(#[$layer_doc])*
        #[must_use = "a layer does nothing until it wraps a service"]
        #[derive(Clone)]
        pub struct $Layer<$($K,)* $($G,)* M = $crate::classify::Http, R = $crate::respond::AsError> {
            plan: $crate::admission::Plan<$Policy, M, R>,
            $($field: $G,)*
        }

        impl<$($K,)* $($G,)* M, R> $Layer<$($K,)* $($G,)* M, R> {
            /// Sets a closure that classifies calls. It makes the layer work with any request and response types.
            ///
            /// The argument is the result of the wrapped service, as `Result<&Response, &Error>`. The types must be
            /// exactly those of the wrapped service. The call ends with its response; the body of an HTTP response is
            /// not observed.
            ///
            /// ```
            /// use buttress::{CircuitBreakerLayer, Outcome};
            /// # struct Row; enum DbError { Constraint, Gone }
            ///
            /// let layer = CircuitBreakerLayer::http().classify(|result: Result<&Row, &DbError>| match result {
            ///     Ok(_) | Err(DbError::Constraint) => Outcome::success(),
            ///     Err(DbError::Gone) => Outcome::failure(),
            /// });
            /// # let _ = layer;
            /// ```
            pub fn classify<C, Res, E>(self, classify: C) -> $Layer<$($K,)* $($G,)* $crate::classify::Classify<C>, R>
            where
                C: for<'a> Fn(Result<&'a Res, &'a E>) -> $crate::outcome::Outcome
                    + Clone
                    + Send
                    + Sync
                    + 'static,
            {
                $Layer { plan: self.plan.with_protocol($crate::classify::Classify(classify)), $($field: self.$field,)* }
            }

            /// Sets a closure that classifies HTTP response heads. Bodies are still observed to their end.
            ///
            /// ```
            /// use buttress::{outcome::Reason, CircuitBreakerLayer, Outcome};
            ///
            /// let layer = CircuitBreakerLayer::http().classify_head(|status, headers| match status.as_u16() {
            ///     429 => Outcome::throttled(),
            ///     code @ 500..=599 => Outcome::failure().because(Reason::Status).with_code(code),
            ///     _ if headers.contains_key("x-degraded") => Outcome::failure(),
            ///     _ => Outcome::success(),
            /// });
            /// # let _ = layer;
            /// ```
            pub fn classify_head<C>(self, classify: C) -> $Layer<$($K,)* $($G,)* $crate::classify::ClassifyHead<C>, R>
            where
                C: Fn(::http::StatusCode, &::http::HeaderMap) -> $crate::outcome::Outcome
                    + Clone
                    + Send
                    + Sync
                    + 'static,
            {
                $Layer { plan: self.plan.with_protocol($crate::classify::ClassifyHead(classify)), $($field: self.$field,)* }
            }

            /// Sets a classifier of `tower_http::classify`. It classifies calls at the head or in the trailers.
            #[cfg(feature = "tower-http")]
            #[cfg_attr(docsrs, doc(cfg(feature = "tower-http")))]
            pub fn classifier<C>(self, classifier: C) -> $Layer<$($K,)* $($G,)* $crate::classify::TowerHttp<C>, R>
            where
                C: tower_http::classify::MakeClassifier + Clone + Send + Sync + 'static,
            {
                $Layer { plan: self.plan.with_protocol($crate::classify::TowerHttp(classifier)), $($field: self.$field,)* }
            }

            /// Counts each response as a success, for services of any types. The call ends with its response. Errors
            /// are classified by their type, and errors of unknown types are failures.
            pub fn per_response(self) -> $Layer<$($K,)* $($G,)* $crate::classify::PerResponse, R> {
                $Layer { plan: self.plan.with_protocol($crate::classify::PerResponse), $($field: self.$field,)* }
            }

            /// Responds to rejected calls with an HTTP or gRPC response, and keeps the error type of the service.
            /// Servers and tonic clients need this. See [`Respond`]($crate::respond::Respond).
            pub fn respond(self) -> $Layer<$($K,)* $($G,)* M, $crate::respond::Respond> {
                $Layer { plan: self.plan.with_reject($crate::respond::Respond), $($field: self.$field,)* }
            }

            /// Responds to rejected calls with the result of a closure: a response, or an error of the service's own
            /// type.
            ///
            /// ```
            /// use buttress::{ConcurrencyLimitLayer, Rejected};
            /// # struct Row; enum DbError { Rejected(Rejected) }
            ///
            /// let layer = ConcurrencyLimitLayer::new(20)
            ///     .per_response()
            ///     .respond_with(|rejected| Err::<Row, _>(DbError::Rejected(rejected.clone())));
            /// # let _ = layer;
            /// ```
            pub fn respond_with<F, Res, E>(self, respond: F) -> $Layer<$($K,)* $($G,)* M, $crate::respond::RespondWith<F>>
            where
                F: Fn(&$crate::outcome::Rejected) -> Result<Res, E> + Clone + Send + Sync + 'static,
            {
                $Layer { plan: self.plan.with_reject($crate::respond::RespondWith(respond)), $($field: self.$field,)* }
            }

            /// Returns the layer, or the error of the first setting that cannot work.
            ///
            /// # Errors
            ///
            /// The [`ConfigError`]($crate::error::ConfigError) names the field, the value and the remedy.
            pub fn checked(mut self) -> Result<Self, $crate::error::ConfigError> {
                match self.plan.fault.take() {
                    None => Ok(self),
                    Some(fault) => Err(fault),
                }
            }
        }

        impl<$($K,)* $($G,)* M, R> ::std::fmt::Debug for $Layer<$($K,)* $($G,)* M, R> {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                f.debug_struct(stringify!($Layer))
                    .field("state", &self.plan.policy)
                    .field("fault", &self.plan.fault)
                    .finish_non_exhaustive()
            }
        }

        $crate::admission::admission_service! {
            $(#[$service_doc])* service $Service [$($K),*]
            future $Future
            policy $Policy
            $(where $($bounds)+)?
        }
    };
}
pub(crate) use admission_layer;

/// Defines the service of an admission layer, and the future of a call. [`admission_layer`] describes the arguments. A
/// layer without public setters uses this macro alone.
macro_rules! admission_service {
    (
        $(#[$service_doc:meta])* service $Service:ident [$($K:ident),*]
        future $Future:ident
        policy $Policy:ty
        $(where $($bounds:tt)+)?
    ) => {
        $(#[$service_doc])*
        pub struct $Service<S, $($K,)* M = $crate::classify::Http, R = $crate::respond::AsError> {
            admission: $crate::admission::Admission<S, $Policy, M, R>,
        }

        impl<S, $($K,)* M, R> $Service<S, $($K,)* M, R> {
            /// Returns the wrapped service.
            pub fn get_ref(&self) -> &S {
                self.admission.inner()
            }

            /// Returns the wrapped service. A call that is made on it directly bypasses this layer.
            pub fn get_mut(&mut self) -> &mut S {
                self.admission.inner_mut()
            }

            /// Returns the wrapped service, without this layer.
            pub fn into_inner(self) -> S {
                self.admission.into_inner()
            }
        }

        impl<S: Clone, $($K: Clone,)* M: Clone, R: Clone> Clone for $Service<S, $($K,)* M, R> {
            fn clone(&self) -> Self {
                Self { admission: self.admission.clone() }
            }
        }

        impl<S, $($K,)* M, R> ::std::fmt::Debug for $Service<S, $($K,)* M, R> {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                f.debug_struct(stringify!($Service))
                    .field("state", self.admission.policy())
                    .finish_non_exhaustive()
            }
        }

        impl<S, $($K,)* M, R, Req> ::tower_service::Service<Req> for $Service<S, $($K,)* M, R>
        where
            S: ::tower_service::Service<Req> + $crate::admission::Reusable,
            M: $crate::classify::Protocol<Req, S::Response, S::Error>,
            R: $crate::respond::Reject<Req, M::Response, S::Error>,
            $($($bounds)+)?
        {
            type Response = M::Response;
            type Error = R::Error;
            type Future = $Future<S, Req, S::Future, M::Call, $($K,)* M, R>;

            #[inline]
            fn poll_ready(
                &mut self,
                cx: &mut ::std::task::Context<'_>,
            ) -> ::std::task::Poll<Result<(), Self::Error>> {
                self.admission.poll_ready(cx)
            }

            #[inline]
            fn call(&mut self, request: Req) -> Self::Future {
                $Future { future: self.admission.call(request) }
            }
        }

        ::pin_project_lite::pin_project! {
            #[doc = concat!("The future of a call of [`", stringify!($Service), "`].")]
            ///
            /// Dropping it at any point releases the permit, or leaves the queue. `F` is the future of the inner
            /// service, and `C` the part of the request that the protocol has recorded. They are parameters of their
            /// own, because the compiler cannot prove that a spawned task with a projection of a boxed error is `Send`
            /// (rust-lang/rust#100013).
            #[must_use = "futures do nothing unless polled"]
            pub struct $Future<S, Req, F, C, $($K,)* M, R>
            $(where $($bounds)+)?
            {
                #[pin]
                future: $crate::admission::AdmissionFuture<S, Req, F, C, $Policy, M, R>,
            }
        }

        impl<S, $($K,)* M, R, Req> ::std::future::Future
            for $Future<S, Req, S::Future, M::Call, $($K,)* M, R>
        where
            S: ::tower_service::Service<Req>,
            M: $crate::classify::Protocol<Req, S::Response, S::Error>,
            R: $crate::respond::Reject<Req, M::Response, S::Error>,
            $($($bounds)+)?
        {
            type Output = Result<M::Response, R::Error>;

            #[inline]
            fn poll(
                self: ::std::pin::Pin<&mut Self>,
                cx: &mut ::std::task::Context<'_>,
            ) -> ::std::task::Poll<Self::Output> {
                self.project().future.poll(cx)
            }
        }

        impl<S, Req, F, C, $($K,)* M, R> ::std::fmt::Debug for $Future<S, Req, F, C, $($K,)* M, R>
        $(where $($bounds)+)?
        {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                f.debug_tuple(stringify!($Future)).field(&self.future).finish()
            }
        }
    };
}
pub(crate) use admission_service;
