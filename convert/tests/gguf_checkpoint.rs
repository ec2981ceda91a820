//! A GGUF file seen as a checkpoint is the folder that `import` makes of it, tensor by tensor and file by file.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use pipit_convert::checkpoint::Checkpoint;
use pipit_convert::gguf::TensorType;
use pipit_convert::import::{GgufCheckpoint, ImportError, import};
use pipit_convert::progress::Silent;
use support::architectures::{checkpoint, convert, names};

#[test]
fn it_is_what_import_makes() {
    let scratch = tempfile::tempdir().unwrap();
    for name in names() {
        let folder = checkpoint(name, scratch.path());
        let path = scratch.path().join(format!("{name}.gguf"));
        let gguf = convert(&folder, TensorType::BF16, &path).unwrap();
        let imported = scratch.path().join(format!("{name}-imported"));
        import(&gguf, &imported, TensorType::F32, &Silent).unwrap();

        let seen = GgufCheckpoint::open(gguf.path()).unwrap();
        let written = scratch.path().join(format!("{name}-files"));
        std::fs::create_dir(&written).unwrap();
        seen.write_files(&written).unwrap();
        let mut files = support::names(&imported);
        files.retain(|file| file != "model.safetensors");
        assert_eq!(support::names(&written), files, "{name}");
        for file in files.iter().filter(|file| written.join(file).is_file()) {
            let read = |dir: &std::path::Path| std::fs::read(dir.join(file)).unwrap();
            assert_eq!(read(&written), read(&imported), "{name}: {file}");
        }

        let folder = Checkpoint::open(&imported).unwrap();
        assert!(seen.names().eq(folder.names()), "{name}");
        for tensor in seen.names() {
            let (ours, theirs) = (seen.tensor(tensor).unwrap(), folder.tensor(tensor).unwrap());
            assert_eq!(ours.shape(), theirs.shape, "{name}: {tensor}");
            ours.check().unwrap();
            let values = theirs.to_f32().unwrap();
            assert_eq!(ours.to_f32().unwrap(), values, "{name}: {tensor}");
            if let [rows, .., columns] = *ours.shape() {
                let mut last = vec![f32::NAN; columns];
                ours.read_rows(rows - 1..rows, &mut last).unwrap();
                assert_eq!(last, values[(rows - 1) * columns..], "{name}: {tensor}, last row");
            }
        }
    }
}

#[test]
fn a_file_that_is_no_model_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("text.gguf");
    std::fs::write(&path, "no model").unwrap();
    assert!(matches!(GgufCheckpoint::open(&path), Err(ImportError::Gguf(_))));
}
