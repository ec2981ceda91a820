//! An importance matrix, as GGUF and in the old format.
#![no_main]

use std::cell::OnceCell;

use libfuzzer_sys::fuzz_target;
use pipit_convert::imatrix::Imatrix;
use pipit_convert_fuzz::Folder;

thread_local!(static FOLDER: OnceCell<Folder> = const { OnceCell::new() });

fuzz_target!(|data: &[u8]| {
    FOLDER.with(|folder| {
        let folder = folder.get_or_init(Folder::new);
        folder.put("imatrix", data);
        let _ = Imatrix::open(&folder.path().join("imatrix"));
    });
});
