//! A TCP balancer.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{io::copy_bidirectional, net::TcpStream};

use super::listener;

/// The addresses in rotation. Clones share them.
#[derive(Clone, Default)]
pub struct Balancer(Arc<Mutex<Vec<SocketAddr>>>);

impl Balancer {
    fn change<T>(&self, change: impl FnOnce(&mut Vec<SocketAddr>) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts an address into rotation.
    pub fn insert(&self, addr: SocketAddr) {
        self.change(|servers| servers.push(addr));
    }

    /// Takes an address out of rotation. Connections to it remain.
    pub fn remove(&self, addr: SocketAddr) {
        self.change(|servers| servers.retain(|other| *other != addr));
    }

    /// Forwards each connection to the next server in rotation.
    pub async fn start(&self) -> SocketAddr {
        let ((listener, addr), balancer) = (listener().await, self.clone());
        tokio::spawn(async move {
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let next = balancer.change(|servers| {
                    servers.rotate_left(1);
                    servers[0]
                });
                tokio::spawn(async move {
                    let mut server = TcpStream::connect(next).await?;
                    client.set_nodelay(true)?;
                    server.set_nodelay(true)?;
                    copy_bidirectional(&mut client, &mut server).await
                });
            }
        });
        addr
    }
}
