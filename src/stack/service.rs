//! The opaque service types of the stacks.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use pin_project_lite::pin_project;

pin_project! {
    /// The future of a [`ClientStackService`](super::client::ClientStackService) or a
    /// [`ServerStackService`](super::server::ServerStackService).
    #[must_use = "futures do nothing unless polled"]
    pub struct StackFuture<F> {
        #[pin]
        future: F,
    }
}

impl<F> StackFuture<F> {
    #[inline]
    pub(super) fn new(future: F) -> Self {
        Self { future }
    }
}

impl<F: Future> Future for StackFuture<F> {
    type Output = F::Output;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.project().future.poll(cx)
    }
}

impl<F> fmt::Debug for StackFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StackFuture").finish_non_exhaustive()
    }
}

/// Defines the opaque service of a stack around its layers.
macro_rules! stack_service {
    ($(#[$doc:meta])* $Name:ident of $Layers:ident, inner $inner:expr) => {
        $(#[$doc])*
        ///
        /// The layers that it contains, and with them the bounds of its implementations, are not part of the API.
        pub struct $Name<S> {
            layers: $Layers<S>,
        }

        impl<S> $Name<S> {
            /// Returns the wrapped service.
            #[must_use]
            pub fn get_ref(&self) -> &S {
                let inner: fn(&$Layers<S>) -> &S = $inner;
                inner(&self.layers)
            }
        }

        impl<S, B> Service<Request<B>> for $Name<S>
        where
            $Layers<S>: Service<Request<B>>,
        {
            type Response = <$Layers<S> as Service<Request<B>>>::Response;
            type Error = <$Layers<S> as Service<Request<B>>>::Error;
            type Future = StackFuture<<$Layers<S> as Service<Request<B>>>::Future>;

            #[inline]
            fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
                self.layers.poll_ready(cx)
            }

            #[inline]
            fn call(&mut self, request: Request<B>) -> Self::Future {
                StackFuture::new(self.layers.call(request))
            }
        }

        impl<S: Clone> Clone for $Name<S> {
            fn clone(&self) -> Self {
                Self { layers: self.layers.clone() }
            }
        }

        impl<S> fmt::Debug for $Name<S> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($Name)).finish_non_exhaustive()
            }
        }
    };
}
pub(super) use stack_service;
