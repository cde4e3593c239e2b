//! The data of a request body that has been sent.

use bytes::{Bytes, BytesMut};

/// The data of a body, in the order it was sent.
#[derive(Default)]
pub(crate) struct Sent {
    first: Option<Bytes>,
    /// `None` for a body of one piece, as most bodies are.
    more: Option<Box<More>>,
}

#[derive(Default)]
struct More {
    pieces: Vec<Bytes>,
    /// The data after the first pieces, copied into one buffer. It becomes a piece at the next rewind.
    gathered: BytesMut,
}

/// The maximum number of pieces that are saved as they are, shared and not copied. Each piece keeps its whole buffer
/// alive. Without a maximum, a body of many small pieces would hold far more memory than the cap.
const APART: usize = 32;

impl Sent {
    pub(crate) fn push(&mut self, data: Bytes) {
        if self.first.is_none() {
            self.first = Some(data);
            return;
        }
        let more = self.more.get_or_insert_default();
        if more.pieces.len() + 1 < APART {
            more.pieces.push(data);
        } else {
            more.gathered.extend_from_slice(&data);
        }
    }

    /// Turns the gathered data into a piece, so that a new reader can read it.
    pub(crate) fn rewind(&mut self) {
        if let Some(more) = self.more.as_mut().filter(|more| !more.gathered.is_empty()) {
            more.pieces.push(more.gathered.split().freeze());
        }
    }

    pub(crate) fn get(&self, nth: usize) -> Option<&Bytes> {
        match nth.checked_sub(1) {
            None => self.first.as_ref(),
            Some(nth) => self.more.as_ref()?.pieces.get(nth),
        }
    }

    /// Returns the number of pieces that can be read.
    pub(crate) fn len(&self) -> usize {
        let more = self.more.as_ref().map_or(0, |more| more.pieces.len());
        usize::from(self.first.is_some()) + more
    }

    /// Returns the number of bytes that can be read from this piece on.
    pub(crate) fn bytes_from(&self, nth: usize) -> u64 {
        (nth..self.len()).filter_map(|nth| self.get(nth)).map(|data| data.len() as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(sent: &Sent) -> Vec<u8> {
        (0..sent.len()).flat_map(|nth| sent.get(nth).unwrap().to_vec()).collect()
    }

    #[test]
    fn many_pieces_are_kept_in_few() {
        let mut sent = Sent::default();
        let mut whole = Vec::new();
        for round in 0..3 {
            for n in 0..1000_u32 {
                let data = Bytes::copy_from_slice(&(round * 1000 + n).to_be_bytes());
                whole.extend_from_slice(&data);
                sent.push(data);
            }
            sent.rewind();
            assert_eq!(read(&sent), whole);
            assert_eq!(sent.bytes_from(0), whole.len() as u64);
            assert!(sent.len() <= APART + 3, "{}", sent.len());
        }
    }

    #[test]
    fn a_piece_is_shared_and_not_copied() {
        let (mut sent, data) = (Sent::default(), Bytes::from(vec![0; 9]));
        sent.push(data.clone());
        sent.push(data.clone());
        for nth in 0..2 {
            assert_eq!(sent.get(nth).unwrap().as_ptr(), data.as_ptr());
        }
    }
}
