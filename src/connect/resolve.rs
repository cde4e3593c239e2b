//! A bounded number of DNS lookups with the system's resolver.
//!
//! `getaddrinfo` blocks a thread and cannot be cancelled: hyper-util's `GaiResolver` leaves the thread behind when its
//! future is dropped, because `JoinHandle::abort` does not end a blocking task that runs. A connect that timed out
//! releases its permit, so its successor would block the next thread, up to all 512 of tokio's blocking pool.
//!
//! Here a lookup owns its permit and its entry in the map until `getaddrinfo` returns, even if its callers have been
//! dropped. Callers for the same host wait for the lookup in progress. The number of permits bounds the map and the
//! threads.

use std::{
    collections::HashMap,
    error::Error,
    fmt,
    future::Future,
    io,
    net::{SocketAddr, ToSocketAddrs},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use crate::sync::{Mutex, MutexGuard};
use hyper_util::client::legacy::connect::dns::Name;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::spawn_blocking,
};
use tower_service::Service;

/// The maximum number of lookups in progress.
const MAX_LOOKUPS: usize = 32;

/// The result of a lookup, which several callers share.
type LookupResult = Result<Arc<[SocketAddr]>, Arc<io::Error>>;

/// The lookups of a [`ConnectLayer`](super::layer::ConnectLayer) in progress.
pub(super) struct Lookups {
    permits: Arc<Semaphore>,
    /// The results of the lookups in progress, which are published when the lookups end.
    by_host: Mutex<HashMap<Box<str>, watch::Receiver<Option<LookupResult>>>>,
}

impl Lookups {
    pub(super) fn new() -> Arc<Self> {
        let permits = Arc::new(Semaphore::new(MAX_LOOKUPS));
        Arc::new(Self { permits, by_host: Mutex::default() })
    }

    /// Returns the number of lookups in progress.
    pub(super) fn count(&self) -> usize {
        self.by_host().len()
    }

    /// Waits for the lookup of this host that is in progress, or starts one.
    async fn resolve(self: Arc<Self>, host: Box<str>) -> io::Result<Addresses> {
        let in_progress = self.by_host().get(&host).cloned();
        let mut result = match in_progress {
            Some(result) => result,
            None => {
                let permit = self.permits.clone().acquire_owned().await;
                self.join_or_start(host, permit.map_err(io::Error::other)?)
            }
        };
        let result = result.wait_for(Option::is_some).await;
        match result.as_deref() {
            Ok(Some(Ok(addresses))) => Ok(Addresses { addresses: addresses.clone(), next: 0 }),
            Ok(Some(Err(error))) => Err(io::Error::new(error.kind(), SharedError(error.clone()))),
            // The runtime of the lookup is shutting down.
            Ok(None) | Err(_) => Err(io::ErrorKind::Interrupted.into()),
        }
    }

    /// Starts a lookup, unless another caller has started one for this host meanwhile.
    fn join_or_start(
        self: &Arc<Self>,
        host: Box<str>,
        permit: OwnedSemaphorePermit,
    ) -> watch::Receiver<Option<LookupResult>> {
        let (sender, receiver) = watch::channel(None);
        {
            let mut by_host = self.by_host();
            if let Some(in_progress) = by_host.get(&host) {
                return in_progress.clone();
            }
            by_host.insert(host.clone(), receiver.clone());
        }
        let lookups = self.clone();
        let lookup = Lookup { lookups, host, result: None, sender, _permit: permit };
        // The task is not awaited. It runs to its end without a caller, and releases the permit.
        drop(spawn_blocking(move || lookup.run()));
        receiver
    }

    fn by_host(&self) -> MutexGuard<'_, HashMap<Box<str>, watch::Receiver<Option<LookupResult>>>> {
        self.by_host.lock()
    }
}

/// A lookup in progress. Dropping it, even before it has run, removes it from the map, publishes its result and then
/// releases its permit. The removal comes first, so that a caller that has the result no longer finds the lookup in
/// progress.
struct Lookup {
    lookups: Arc<Lookups>,
    host: Box<str>,
    result: Option<LookupResult>,
    sender: watch::Sender<Option<LookupResult>>,
    _permit: OwnedSemaphorePermit,
}

impl Lookup {
    fn run(mut self) {
        let result = (&*self.host, 0).to_socket_addrs();
        self.result = Some(result.map(Iterator::collect).map_err(Arc::new));
    }
}

impl Drop for Lookup {
    fn drop(&mut self) {
        let removed = self.lookups.by_host().remove(&self.host);
        // The lock has been released, because publishing runs the wakers of the callers.
        drop(removed);
        self.sender.send_replace(self.result.take());
    }
}

/// The error of a lookup, shared by its callers.
#[derive(Debug)]
struct SharedError(Arc<io::Error>);

impl fmt::Display for SharedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Error for SharedError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}

// ===== The service =====

/// The system's resolver (`getaddrinfo`) with a bounded number of lookups, for a
/// [`TcpConnector`](super::tcp::TcpConnector).
///
/// All clients of one [`ConnectLayer`](super::layer::ConnectLayer) together have a maximum of one lookup per host and
/// 32 lookups in total in progress. A lookup blocks a thread of tokio's blocking pool until the system responds, even
/// if its caller has timed out. Another caller for the same host waits for the lookup in progress and shares its
/// result. Results are not cached.
///
/// # Cancellation
///
/// Dropping the future ends the wait of this caller. The lookup continues until the system responds.
#[derive(Clone)]
pub struct Resolver {
    lookups: Arc<Lookups>,
}

impl Resolver {
    pub(super) fn new(lookups: Arc<Lookups>) -> Self {
        Self { lookups }
    }
}

impl Service<Name> for Resolver {
    type Response = Addresses;
    type Error = io::Error;
    type Future = Resolving;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Resolving {
        Resolving(Box::pin(self.lookups.clone().resolve(name.as_str().into())))
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("lookups", &self.lookups.count()).finish()
    }
}

/// The future of a [`Resolver`].
#[must_use = "futures do nothing unless polled"]
pub struct Resolving(Pin<Box<dyn Future<Output = io::Result<Addresses>> + Send>>);

impl Future for Resolving {
    type Output = io::Result<Addresses>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

impl fmt::Debug for Resolving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolving").finish_non_exhaustive()
    }
}

/// The addresses of a host, in the order of the system's resolver.
#[derive(Clone, Debug)]
pub struct Addresses {
    addresses: Arc<[SocketAddr]>,
    next: usize,
}

impl Iterator for Addresses {
    type Item = SocketAddr;

    fn next(&mut self) -> Option<SocketAddr> {
        let next = self.addresses.get(self.next).copied();
        self.next += usize::from(next.is_some());
        next
    }
}
