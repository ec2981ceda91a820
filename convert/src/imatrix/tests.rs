use super::*;

fn entry(sums: &[f32], counts: &[i64]) -> Entry {
    Entry {
        sums: sums.to_vec(),
        counts: counts.to_vec(),
    }
}

fn some() -> Imatrix {
    Imatrix {
        entries: [
            (
                "blk.0.attn_q.weight".to_owned(),
                entry(&[2.0, 4.0, 0.0, 8.0], &[4]),
            ),
            (
                "blk.0.ffn_up_exps.weight".to_owned(),
                entry(&[2.0, 4.0, 0.0, 0.0], &[2, 0]),
            ),
        ]
        .into(),
        datasets: vec!["wiki.txt".into()],
        chunks: 3,
        chunk_size: 512,
    }
}

#[test]
fn what_is_written_is_read_again() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("imatrix.gguf");
    some().write(&path, Vec::new()).unwrap();
    assert_eq!(Imatrix::open(&path).unwrap(), some());
}

#[test]
fn weights_are_mean_squares_and_one_where_nothing_was_seen() {
    let importance = some().importance("a.gguf");
    assert_eq!(importance.weights["blk.0.attn_q.weight"], [0.5, 1.0, 0.0, 2.0]);
    assert_eq!(
        importance.weights["blk.0.ffn_up_exps.weight"],
        [1.0, 2.0, 1.0, 1.0]
    );
    assert_eq!((importance.file.as_str(), importance.chunks), ("a.gguf", 3));
}

/// One entry of two values, then the number of chunks and the text.
fn legacy() -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(1i32.to_le_bytes());
    bytes.extend(5i32.to_le_bytes());
    bytes.extend(b"blk.0");
    bytes.extend(4i32.to_le_bytes());
    bytes.extend(2i32.to_le_bytes());
    bytes.extend(6f32.to_le_bytes());
    bytes.extend(2f32.to_le_bytes());
    bytes.extend(4i32.to_le_bytes());
    bytes.extend(8i32.to_le_bytes());
    bytes.extend(b"wiki.txt");
    bytes
}

fn open(bytes: &[u8]) -> Result<Imatrix, ImatrixError> {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("imatrix.dat");
    std::fs::write(&path, bytes).unwrap();
    Imatrix::open(&path)
}

#[test]
fn the_older_format_is_read_with_and_without_its_end() {
    let whole = open(&legacy()).unwrap();
    assert_eq!(whole.entries["blk.0"].weights(), [1.5, 0.5]);
    assert_eq!(
        (whole.chunks, &whole.datasets[..]),
        (4, &["wiki.txt".to_owned()][..])
    );
    let short = open(&legacy()[..legacy().len() - 16]).unwrap();
    assert_eq!(short.entries, whole.entries);
    assert_eq!(short.chunks, 0);
}

#[test]
fn a_broken_older_file_is_refused_wherever_it_is_cut() {
    let whole = legacy();
    for length in (0..whole.len()).filter(|length| ![whole.len() - 16, whole.len() - 12].contains(length)) {
        let error = open(&whole[..length]).unwrap_err().to_string();
        assert!(error.contains("is no importance matrix"), "{length}: {error}");
    }
    let mut huge = whole;
    huge[17..21].copy_from_slice(&i32::MAX.to_le_bytes());
    assert!(open(&huge).is_err());
}

#[test]
fn sums_that_are_no_sums_of_squares_are_refused() {
    for bad in [f32::NAN, f32::INFINITY, -1.0] {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("imatrix.gguf");
        let mut imatrix = some();
        imatrix.entries.insert("blk.1".into(), entry(&[1.0, bad], &[4]));
        imatrix.write(&path, Vec::new()).unwrap();
        let error = Imatrix::open(&path).unwrap_err().to_string();
        assert!(
            error.contains("blk.1 has a sum of squares that is none"),
            "{error}"
        );
    }
}
