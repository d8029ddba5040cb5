<?php
// Values as Laravel writes them (php-illuminate-encryption 8.83.26 of Debian bookworm, PHP 8.2): php laravel.php
use Illuminate\Encryption\Encrypter;
$made = [];
foreach (["AES-256-CBC" => 32, "AES-128-CBC" => 16, "AES-256-GCM" => 32, "AES-128-GCM" => 16] as $cipher => $bytes) {
    $key = random_bytes($bytes);
    $encrypter = new Encrypter($key, strtolower($cipher));
    foreach (["s3cret", "", "grüße, 世界", str_repeat("x", 200)] as $text) {
        $entry = ["format" => "laravel", "key" => "base64:" . base64_encode($key), "plaintext" => $text];
        $made[] = $entry + ["value" => $encrypter->encryptString($text)];
        $made[] = $entry + ["value" => $encrypter->encrypt($text), "unwrap" => "php"];
    }
}
echo json_encode($made, JSON_PRETTY_PRINT | JSON_UNESCAPED_UNICODE | JSON_UNESCAPED_SLASHES), "\n";
