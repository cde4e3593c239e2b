use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinSet,
    time::sleep,
};

use super::{Connection, refusal};
use crate::{ConcurrencyLimitLayer, ConfigError, limit::ConcurrencyLimitHandle};

/// A TCP listener with so many connections at once. See the [module](super).
#[derive(Debug)]
pub struct LimitedListener {
    tcp: TcpListener,
    places: ConcurrencyLimitHandle,
    refusals: JoinSet<()>,
    waits: bool,
}

/// So many are told at once that there is no room.
const MOST_REFUSALS: usize = 64;
/// After an error that is not one connection's, such as no descriptors being left: as axum and hyper do.
const PAUSE: Duration = Duration::from_secs(1);

impl LimitedListener {
    /// Listens at `addr` with room for `backlog` connections that are yet to be accepted (the system may have
    /// a cap of its own), and accepts up to `limit` at once.
    ///
    /// # Errors
    ///
    /// As the system says; a limit that is none as [`InvalidInput`](io::ErrorKind::InvalidInput), with the
    /// [`ConfigError`] in it.
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime with IO.
    pub fn bind(addr: SocketAddr, backlog: u32, limit: usize) -> io::Result<Self> {
        let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // A restart must not wait for old connections to be forgotten. Elsewhere it means something else.
        #[cfg(unix)]
        socket.set_reuseaddr(true)?;
        socket.bind(addr)?;
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidInput, error);
        Self::new(socket.listen(backlog)?, limit).map_err(invalid)
    }

    /// Accepts up to `limit` connections at once from `tcp`.
    ///
    /// # Errors
    ///
    /// A limit of zero, or of more than `u32::MAX`.
    pub fn new(tcp: TcpListener, limit: usize) -> Result<Self, ConfigError> {
        let limit = ConcurrencyLimitLayer::new(limit)
            // The listener alone waits, and it has all the time there is.
            .queue(1, Duration::from_secs(u32::MAX.into()))
            .name("connections")
            .checked()?;
        let places = limit.handle();
        Ok(Self { tcp, places, refusals: JoinSet::new(), waits: false })
    }

    /// Accepts nothing while all places are taken, instead of accepting and refusing: what comes waits in the
    /// backlog.
    #[must_use]
    pub fn wait_when_full(mut self) -> Self {
        self.waits = true;
        self
    }

    /// Looks at the connections, and resizes the limit.
    #[must_use]
    pub fn handle(&self) -> ConcurrencyLimitHandle {
        self.places.clone()
    }

    /// Where it listens.
    ///
    /// # Errors
    ///
    /// As the system says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// The next connection that has a place. It may be dropped at any time, and called again; what has been
    /// accepted and waits for a place that was taken by hand is closed then.
    ///
    /// Errors are not told: those of one connection are skipped, and after others, such as no descriptors
    /// being left, it waits for a second.
    pub async fn accept(&mut self) -> (Connection, SocketAddr) {
        loop {
            if self.waits {
                // Not kept while nobody comes: it would count as a connection.
                drop(self.places.acquire().await);
            }
            let (tcp, addr) = self.next().await;
            let place =
                if self.waits { self.places.acquire().await } else { self.places.try_acquire() };
            match place {
                Ok(place) => return (Connection::new(tcp, place), addr),
                Err(refused) => {
                    while self.refusals.try_join_next().is_some() {}
                    if self.refusals.len() < MOST_REFUSALS {
                        self.refusals.spawn(refusal::tell(tcp, refused));
                    }
                }
            }
        }
    }

    async fn next(&self) -> (TcpStream, SocketAddr) {
        loop {
            match self.tcp.accept().await {
                Ok(accepted) => return accepted,
                Err(error) if is_of_one_connection(&error) => {}
                Err(_) => sleep(PAUSE).await,
            }
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(error.kind(), K::ConnectionRefused | K::ConnectionAborted | K::ConnectionReset)
}

#[cfg(feature = "axum")]
#[cfg_attr(docsrs, doc(cfg(feature = "axum")))]
impl axum::serve::Listener for LimitedListener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        Self::accept(self).await
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Self::local_addr(self)
    }
}
