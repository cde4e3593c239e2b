//! The saved data of a request body that has been sent.

use bytes::{Bytes, BytesMut};

/// The data of a body, in the order it was sent.
#[derive(Default)]
pub(crate) struct SavedData {
    first: Option<Bytes>,
    /// `None` for a body of one piece, as most bodies are.
    more: Option<Box<MorePieces>>,
}

#[derive(Default)]
struct MorePieces {
    pieces: Vec<Bytes>,
    /// The data after the first pieces, copied into one buffer. It becomes a piece at the next reset.
    gathered: BytesMut,
}

/// The maximum number of pieces that are saved as they are, shared and not copied. Each piece keeps its whole buffer
/// alive. Without a maximum, a body of many small pieces would hold far more memory than the cap.
const MAX_SHARED_PIECES: usize = 32;

impl SavedData {
    pub(crate) fn push(&mut self, data: Bytes) {
        if self.first.is_none() {
            self.first = Some(data);
            return;
        }
        let more = self.more.get_or_insert_default();
        if more.pieces.len() + 1 < MAX_SHARED_PIECES {
            more.pieces.push(data);
        } else {
            more.gathered.extend_from_slice(&data);
        }
    }

    /// Turns the gathered data into a piece, so that a new reader can read it.
    pub(crate) fn reset(&mut self) {
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

    fn read(saved: &SavedData) -> Vec<u8> {
        (0..saved.len()).flat_map(|nth| saved.get(nth).unwrap().to_vec()).collect()
    }

    #[test]
    fn many_small_pieces_are_merged() {
        let mut saved = SavedData::default();
        let mut whole = Vec::new();
        for round in 0..3 {
            for n in 0..1000_u32 {
                let data = Bytes::copy_from_slice(&(round * 1000 + n).to_be_bytes());
                whole.extend_from_slice(&data);
                saved.push(data);
            }
            saved.reset();
            assert_eq!(read(&saved), whole);
            assert_eq!(saved.bytes_from(0), whole.len() as u64);
            assert!(saved.len() <= MAX_SHARED_PIECES + 3, "{}", saved.len());
        }
    }

    #[test]
    fn first_pieces_are_shared_and_not_copied() {
        let (mut saved, data) = (SavedData::default(), Bytes::from(vec![0; 9]));
        saved.push(data.clone());
        saved.push(data.clone());
        for nth in 0..2 {
            assert_eq!(saved.get(nth).unwrap().as_ptr(), data.as_ptr());
        }
    }
}
