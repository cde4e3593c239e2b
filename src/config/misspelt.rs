//! Finds the key that an unknown key is a misspelling of.

/// Returns the nearest key, unless more than a quarter of its letters or more than [`MAX_CHANGES`] have to be changed.
pub(super) fn near_miss(
    key: &str,
    keys: impl Iterator<Item = &'static str>,
) -> Option<&'static str> {
    let known = keys.map(|known| (distance(key, known), known));
    let (distance, known) = known.min_by_key(|(distance, _)| *distance)?;
    (distance <= (known.len() / 4).min(MAX_CHANGES)).then_some(known)
}

/// The maximum number of changed letters of a misspelt key.
const MAX_CHANGES: usize = 3;

/// Returns the number of letters that have to be changed (Levenshtein distance). Only the first 64 letters of `one` are
/// used, to bound the work for long keys; every known key is shorter.
fn distance(one: &str, other: &str) -> usize {
    let one: Vec<char> = one.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=one.len()).collect();
    for (i, b) in other.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, a) in one.iter().enumerate() {
            let changed = diagonal + usize::from(*a != b);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[one.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_distance_is_levenshteins() {
        for (one, other, changes) in
            [("", "", 0), ("a", "", 1), ("kitten", "sitting", 3), ("flaw", "lawn", 2)]
        {
            assert_eq!((distance(one, other), distance(other, one)), (changes, changes));
        }
    }
}
